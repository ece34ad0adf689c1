"""Builds the package with the shipped configs in it, so that `stepdistill run letters` works from any folder."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Copies configs/*.yaml of the checkout to stepdistill/configs/*.yaml of the wheel."""

    def run(self) -> None:
        """Builds as setuptools does, then copies."""
        super().run()
        if self.editable_mode:  # the checkout's folder is read there
            return
        target = Path(self.build_lib) / "stepdistill" / "configs"
        self.mkpath(str(target))
        for config in sorted(Path("configs").glob("*.yaml")):
            self.copy_file(str(config), str(target / config.name))


setup(cmdclass={"build_py": BuildWithConfigs})
