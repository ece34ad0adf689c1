"""A finished rung on disk: its LoRA, and a record that describes it. Reading one needs no torch.

rungs/<student_steps>/pytorch_lora_weights.safetensors   the LoRA on the base model
rungs/<student_steps>/rung.json                          steps, prediction type, base, sha256, checksum; written last
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from stepdistill.disk.durable import read_sealed, sha256_file, warn_of_damage, write_sealed

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
RECORD_NAME = "rung.json"


@dataclass(frozen=True)
class RungRecord:
    """Facts about a rung's LoRA that are needed to sample with it, and how it was made."""

    student_steps: int
    teacher_steps: int
    prediction_type: str
    lora_rank: int
    base_fingerprint: str
    sha256: str
    training_seconds: float | None = None
    """None in the header of a kohya file, whose bytes must depend on the weights alone."""
    start_timestep: int | None = None
    samples_per_update: int | None = None
    """Over all processes; None in records of earlier versions."""
    teacher_sha256: str | None = None
    """sha256 of the LoRA that the student began with, the rung before's; None for the first rung, and if it is not known."""
    image_size: Sequence[int] | None = None
    """Height and width in pixels that the pipeline must be asked for; None if its own default is right."""

    def write(self, folder: Path) -> None:
        """Writes rung.json."""
        write_sealed(folder / RECORD_NAME, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "RungRecord | None":
        """The record that `write` wrote into a folder; None if it is missing or was changed."""
        return cls.of_json(read_sealed(folder / RECORD_NAME))

    @classmethod
    def of_json(cls, raw: Any) -> "RungRecord | None":
        """A record from plain data; unknown keys are ignored. None if a key is missing or has a value of the wrong type."""
        if not isinstance(raw, dict):
            return None
        given: dict[str, Any] = {field.name: raw[field.name] for field in fields(cls) if field.name in raw}
        try:
            record = cls(**given)
        except TypeError:
            return None
        return record if record._is_sound() else None

    def _is_sound(self) -> bool:
        counts = (self.student_steps, self.teacher_steps, self.lora_rank)
        texts = (self.prediction_type, self.base_fingerprint, self.sha256)
        seconds, start, teacher = self.training_seconds, self.start_timestep, self.teacher_sha256
        size = self.image_size
        return (
            all(type(count) is int and count > 0 for count in counts)
            and all(isinstance(text, str) for text in texts)
            and type(seconds) in (int, float, type(None))
            and (start is None or (type(start) is int and start >= 0))
            and type(self.samples_per_update) in (int, type(None))
            and isinstance(teacher, str | None)
            and (size is None or (isinstance(size, list | tuple) and _is_size(size)))
        )


def _is_size(size: Sequence[object]) -> bool:
    return len(size) == 2 and all(type(side) is int and side > 0 for side in size)


def rung_folder(run_dir: Path, student_steps: int) -> Path:
    """The folder of a rung, rungs/<student_steps> of its run."""
    return run_dir / "rungs" / str(student_steps)


def read_record(run_dir: Path, student_steps: int) -> RungRecord | None:
    """The record of a rung, whose files are not examined; None if it is missing or was changed."""
    return RungRecord.read(rung_folder(run_dir, student_steps))


def folders_of_rungs(run_dir: Path) -> list[int]:
    """student_steps of the rungs that have a folder, finished and intact or damaged, largest first."""
    names = [folder.name for folder in (run_dir / "rungs").glob("*")]
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def read_rung(run_dir: Path, student_steps: int) -> RungRecord | None:
    """The record of a finished rung with intact files, else None; warns if the files exist and are damaged."""
    record, damaged = _examined(run_dir, student_steps)
    if damaged is not None:
        warn_of_damage(damaged, f"the {student_steps}-step rung counts as not finished; fix: {_FIX}")
    return record


def _examined(run_dir: Path, student_steps: int) -> tuple[RungRecord | None, Path | None]:
    """(record, None) for an intact rung, (None, damaged file) for a damaged one, (None, None) if it has no folder."""
    folder = rung_folder(run_dir, student_steps)
    if not folder.is_dir():
        return None, None
    record, weights = RungRecord.read(folder), folder / WEIGHT_NAME
    if record is None or record.student_steps != student_steps:
        return None, folder / RECORD_NAME
    if not weights.is_file() or sha256_file(weights) != record.sha256:
        return None, weights
    return record, None


_FIX = (
    "`stepdistill distill`, which trains it again, and the rungs after it if its LoRA changed; or put back a copy of the "
    "file"
)


def require_rung(run_dir: Path, student_steps: int) -> RungRecord:
    """The record of a finished rung; ValueError, which says what to do, if it is unfinished or damaged."""
    record, damaged = _examined(run_dir, student_steps)
    if record is not None:
        return record
    if damaged is not None:
        raise ValueError(f"{damaged} is missing or not as it was written; fix: {_FIX}")
    finished = ", ".join(map(str, finished_rungs(run_dir))) or "none"
    raise ValueError(
        f"no finished {student_steps}-step rung in {run_dir}; finished: {finished}; run `stepdistill distill` first"
    )


def finished_rungs(run_dir: Path) -> list[int]:
    """student_steps of a run's finished rungs, largest first."""
    return [n for n in folders_of_rungs(run_dir) if read_rung(run_dir, n) is not None]
