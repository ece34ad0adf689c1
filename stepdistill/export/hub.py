"""A rung's folder on the Hub, only when it is asked for."""

import shutil
import tempfile
from pathlib import Path

from stepdistill.config import ConfigError, RunConfig
from stepdistill.disk.durable import writing
from stepdistill.export.exported import read_scheduler
from stepdistill.export.rung import write_card
from stepdistill.run.rungs import require_rung

_STAYS_HERE = ("previews", "rank*", ".*")


def push_rung(config: RunConfig, student_steps: int, folder: Path, repository: str) -> str:
    """Uploads an exported folder, a commit for all of it; returns its address.

    Args:
        config: the run.
        student_steps: of the rung.
        folder: the rung's, exported.
        repository: OWNER/NAME; made where it is not there, private.
    ConfigError where the Hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with tempfile.TemporaryDirectory() as place:
        copy = stage(config, student_steps, folder, repository, Path(place))
        try:
            api.create_repo(repository, exist_ok=True, private=True)
            message = f"{config.name}: {student_steps} steps"
            return str(api.upload_folder(repo_id=repository, folder_path=copy, commit_message=message))
        except (
            Exception
        ) as error:  # the client raises what its HTTP library does, another one in every version
            first = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"--push: got {repository}: {first}; mend: OWNER/NAME of your own, and `hf auth login` once"
            ) from None


def stage(config: RunConfig, student_steps: int, folder: Path, repository: str, place: Path) -> Path:
    """A copy of the folder as it goes up: without previews and lower ranks, its card naming the repository."""
    copy = place / folder.name
    with writing(copy):
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(*_STAYS_HERE))
    record = require_rung(config.run_dir, student_steps)
    write_card(config, record, copy, read_scheduler(copy), repository=repository)
    return copy
