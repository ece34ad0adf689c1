"""A rung's folder on the Hub, only when it is asked for."""

from pathlib import Path

from stepdistill.config import ConfigError


def push(folder: Path, repository: str) -> str:
    """Uploads an exported folder, a commit for all of it; returns its address.

    Args:
        folder: an exported rung.
        repository: OWNER/NAME; made where it is not there, private.
    ConfigError where the Hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True, private=True)
        return str(
            api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"{folder.name} steps")
        )
    except (
        Exception
    ) as error:  # the client raises what its HTTP library does, which changes from version to version
        first = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"--push: got {repository}: {first}; mend: OWNER/NAME of your own, and `hf auth login` once"
        ) from None
