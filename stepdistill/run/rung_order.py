"""Which rungs of a run's ladder have to be trained: those that are missing or damaged, and those that began with another
LoRA than the rung before them has now. No torch.
"""

import logging
from pathlib import Path

from stepdistill.config import RunConfig, Rung
from stepdistill.disk.durable import sha256_file
from stepdistill.run.rungs import WEIGHT_NAME, read_record, read_rung, rung_folder

logger = logging.getLogger(__name__)


def initial_file(rung: Rung) -> Path:
    """The LoRA file that `init` names: itself, or the one in a rung's folder."""
    path = Path(rung.init or "").expanduser()
    return path / WEIGHT_NAME if path.is_dir() else path


def begun_from(config: RunConfig, rung: Rung) -> str | None:
    """sha256 of the LoRA that the student of a rung begins with: of `init`, if that is still there, else of the rung before,
    as its record says; None for the first rung without init, which may have as many steps as its teacher."""
    if rung.init is not None:
        return sha256_file(initial_file(rung)) if initial_file(rung).is_file() else None
    if rung == config.ladder[0]:
        return None
    before = read_record(config.run_dir, rung.teacher_steps)
    return None if before is None else before.sha256


def is_current(config: RunConfig, rung: Rung) -> bool:
    """Whether a rung is finished, intact, and began with the LoRA that the rung before it has now, or that `init` names, if
    that is still there. Earlier versions did not record what a rung began with; such a rung is taken as current."""
    record = read_rung(config.run_dir, rung.student_steps)
    if record is None:
        return False
    began_alone = rung == config.ladder[0] if rung.init is None else not initial_file(rung).is_file()
    return began_alone or record.teacher_sha256 in (None, begun_from(config, rung))


def warn_of_training_again(config: RunConfig, rung: Rung) -> None:
    """Warns, before a rung is trained, if it or a later one was finished before: why it is trained again, and what becomes
    of the later ones. A rung that `--rung` names needs no warning."""
    if is_current(config, rung):
        return
    record = read_rung(config.run_dir, rung.student_steps)
    rest = config.ladder[config.ladder.index(rung) + 1 :]
    later = [r.student_steps for r in rest if rung_folder(config.run_dir, r.student_steps).is_dir()]
    if record is not None:
        now = "init names" if rung.init is not None else f"the {rung.teacher_steps}-step rung has"
        why = f"began with another LoRA than {now} now"
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
