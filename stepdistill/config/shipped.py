"""The configs that ship with the package, by name: `stepdistill run letters` is configs/letters.yaml. No torch."""

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
"""Their folder in an installed package, and in a checkout."""


def shipped_configs() -> dict[str, Path]:
    """The YAML file of each shipped config by its name, such as "sd15"."""
    folder = next((folder for folder in _FOLDERS if folder.is_dir()), None)
    files = [] if folder is None else sorted(folder.glob("*.yaml"))
    return {file.stem: file for file in files}
