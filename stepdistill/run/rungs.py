"""A finished rung on disk: its LoRA and what it is. Files only; reading one needs no torch.

rungs/<student_steps>/pytorch_lora_weights.safetensors   the LoRA, against the base
rungs/<student_steps>/rung.json                          steps, prediction type, base, sha256, checksum; written last
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from stepdistill.disk.durable import read_sealed, sha256_file, warn_of_damage, write_sealed

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
RECORD_NAME = "rung.json"


@dataclass(frozen=True)
class RungRecord:
    """What a rung's LoRA needs to be used right, and where it came from."""

    student_steps: int
    teacher_steps: int
    prediction_type: str
    lora_rank: int
    base_fingerprint: str
    sha256: str
    training_seconds: float | None = None
    """Not in a kohya file, whose bytes depend on the weights alone."""
    start_timestep: int | None = None

    def write(self, folder: Path) -> None:
        """Writes rung.json."""
        write_sealed(folder / RECORD_NAME, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "RungRecord | None":
        """What `write` left in a folder; None where it is missing or was changed."""
        return cls.of_json(read_sealed(folder / RECORD_NAME))

    @classmethod
    def of_json(cls, raw: Any) -> "RungRecord | None":
        """A record of plain data, whose further keys are passed over; None where one is missing or of another type."""
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
        seconds, start = self.training_seconds, self.start_timestep
        return (
            all(type(count) is int and count > 0 for count in counts)
            and all(isinstance(text, str) for text in texts)
            and type(seconds) in (int, float, type(None))
            and (start is None or (type(start) is int and start >= 0))
        )


def rung_folder(run_dir: Path, student_steps: int) -> Path:
    """rungs/<student_steps> of a run."""
    return run_dir / "rungs" / str(student_steps)


def read_rung(run_dir: Path, student_steps: int) -> RungRecord | None:
    """The record of a finished rung whose files are intact, else None, with a warning where they are there and damaged."""
    record, damaged = _examined(run_dir, student_steps)
    if damaged is not None:
        warn_of_damage(damaged, f"the {student_steps}-step rung counts as not finished; mend: {_MEND}")
    return record


def _examined(run_dir: Path, student_steps: int) -> tuple[RungRecord | None, Path | None]:
    """A rung's record, and the file that is damaged where there is none; neither for a rung that is not there."""
    folder = rung_folder(run_dir, student_steps)
    if not folder.is_dir():
        return None, None
    record, weights = RungRecord.read(folder), folder / WEIGHT_NAME
    if record is None or record.student_steps != student_steps:
        return None, folder / RECORD_NAME
    if not weights.is_file() or sha256_file(weights) != record.sha256:
        return None, weights
    return record, None


_MEND = "`stepdistill distill`, which trains it and those after it again, or a copy of the file"


def require_rung(run_dir: Path, student_steps: int) -> RungRecord:
    """The record of a finished rung; ValueError that says what to run where it is not finished or damaged."""
    record, damaged = _examined(run_dir, student_steps)
    if record is not None:
        return record
    if damaged is not None:
        raise ValueError(f"{damaged} is missing or not as it was written; mend: {_MEND}")
    finished = ", ".join(map(str, finished_rungs(run_dir))) or "none"
    raise ValueError(
        f"no finished {student_steps}-step rung in {run_dir}; finished: {finished}; run `stepdistill distill` first"
    )


def finished_rungs(run_dir: Path) -> list[int]:
    """student_steps of the finished rungs of a run, most steps first."""
    names = [folder.name for folder in (run_dir / "rungs").glob("*")]
    steps = sorted((int(name) for name in names if name.isdecimal()), reverse=True)
    return [n for n in steps if read_rung(run_dir, n) is not None]
