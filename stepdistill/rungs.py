"""A finished rung on disk: its LoRA and what it is. Files only; reading one needs no torch.

rungs/<student_steps>/pytorch_lora_weights.safetensors   the LoRA, against the base
rungs/<student_steps>/rung.json                          steps, prediction type, base, sha256; written last
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from stepdistill.durable import read_json, sha256_file, write_json

WEIGHT_NAME = "pytorch_lora_weights.safetensors"


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
        write_json(folder / "rung.json", asdict(self))


def rung_folder(run_dir: Path, student_steps: int) -> Path:
    """rungs/<student_steps> of a run."""
    return run_dir / "rungs" / str(student_steps)


def read_rung(run_dir: Path, student_steps: int) -> RungRecord | None:
    """The record of a finished rung whose LoRA is intact, else None."""
    folder = rung_folder(run_dir, student_steps)
    raw = read_json(folder / "rung.json")
    weights = folder / WEIGHT_NAME
    if raw is None or not weights.is_file() or sha256_file(weights) != raw.get("sha256"):
        return None
    return RungRecord(**raw)


def require_rung(run_dir: Path, student_steps: int) -> RungRecord:
    """read_rung, or a ValueError that says what to run."""
    record = read_rung(run_dir, student_steps)
    if record is None:
        finished = finished_rungs(run_dir)
        raise ValueError(
            f"no finished {student_steps}-step rung in {run_dir}; finished: {', '.join(map(str, finished)) or 'none'}; "
            f"run `stepdistill distill` first"
        )
    return record


def finished_rungs(run_dir: Path) -> list[int]:
    """student_steps of the finished rungs of a run, most steps first."""
    folders = (run_dir / "rungs").glob("*")
    steps = sorted((int(f.name) for f in folders if f.name.isdigit()), reverse=True)
    return [n for n in steps if read_rung(run_dir, n) is not None]
