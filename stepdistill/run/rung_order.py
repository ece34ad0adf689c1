"""Which rungs of a run's ladder have to be trained: those that are missing or damaged, and those that began with another
LoRA than the rung before them has now. No torch.
"""

import logging

from stepdistill.config import RunConfig, Rung
from stepdistill.run.rungs import read_record, read_rung, rung_folder

logger = logging.getLogger(__name__)


def begun_from(config: RunConfig, rung: Rung) -> str | None:
    """sha256 of the LoRA that the student of a rung begins with, as the rung before it records; None for the first rung,
    which may have as many steps as its teacher."""
    if rung == config.ladder[0]:
        return None
    before = read_record(config.run_dir, rung.teacher_steps)
    return None if before is None else before.sha256


def is_current(config: RunConfig, rung: Rung) -> bool:
    """Whether a rung is finished, intact, and began with the LoRA that the rung before it has now. Earlier versions did not
    record what a rung began with; such a rung is taken as current."""
    record = read_rung(config.run_dir, rung.student_steps)
    if record is None:
        return False
    return rung == config.ladder[0] or record.teacher_sha256 in (None, begun_from(config, rung))


def warn_of_training_again(config: RunConfig, rung: Rung) -> None:
    """Warns, before a rung is trained, if it or a later one was finished before: why it is trained again, and what becomes
    of the later ones. A rung that `--rung` names needs no warning."""
    if is_current(config, rung):
        return
    record = read_rung(config.run_dir, rung.student_steps)
    rest = config.ladder[config.ladder.index(rung) + 1 :]
    later = [r.student_steps for r in rest if rung_folder(config.run_dir, r.student_steps).is_dir()]
    if record is not None:
        why = f"began with another LoRA than the {rung.teacher_steps}-step rung has now"
    elif rung_folder(config.run_dir, rung.student_steps).is_dir():
        why = "is damaged"
    elif later:
        why = "is missing"
    else:
        return
    then = (
        f"; if its LoRA comes out as it was, the rungs of {', '.join(map(str, later))} steps stay, else they are trained "
        f"again"
        if later
        else ""
    )
    logger.warning("distill: the %d-step rung %s: it is trained again%s", rung.student_steps, why, then)
