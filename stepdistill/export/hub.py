"""Uploads a rung's folder to the Hub; called only for `export --push`."""

import shutil
import tempfile
from pathlib import Path

from stepdistill.config import ConfigError, RunConfig
from stepdistill.disk.durable import writing
from stepdistill.export.exported import read_scheduler
from stepdistill.export.rung import write_card
from stepdistill.run.rungs import require_rung

_NOT_UPLOADED = ("previews", "rank*", ".*")


def push_rung(config: RunConfig, student_steps: int, folder: Path, repository: str) -> str:
    """Uploads an exported folder in one commit; returns its URL.

    Args:
        config: config of the run.
        student_steps: step count of the rung.
        folder: the rung's exported folder.
        repository: OWNER/NAME; created as private if it does not exist.
    ConfigError if the Hub refuses or cannot be reached.
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
        ) as error:  # the client raises its HTTP library's errors, whose types differ between versions
            first = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"--push: got {repository}: {first}; fix: OWNER/NAME of your own, and `hf auth login` once"
            ) from None


def stage(config: RunConfig, student_steps: int, folder: Path, repository: str, place: Path) -> Path:
    """Copies the folder to `place` for the upload: without previews and lower ranks, and with the repository in the card."""
    copy = place / folder.name
    with writing(copy):
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(*_NOT_UPLOADED))
    record = require_rung(config.run_dir, student_steps)
    write_card(config, record, copy, read_scheduler(copy), repository=repository)
    return copy
