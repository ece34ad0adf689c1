"""Whether what a config asks for is installed on this machine; looked at before anything is loaded. No torch."""

import importlib.util
import netrc
import os
import shutil
import socket
import sys
import urllib.parse
from collections.abc import Iterator

from stepdistill.config.section import ConfigError
from stepdistill.config.sections import RunConfig

_EXTRAS = {"torchao": "quantize", "prodigyopt": "prodigy", "tensorboard": "trackers"}
_WANDB_URL = "https://api.wandb.ai"
_MAX_SECONDS = 5.0
"""For a tracker's server to answer."""


def check_installed(config: RunConfig) -> None:
    """ConfigError for a setting that needs a package, a compiler or an account that is not there."""
    for problem in installation_problems(config):
        raise ConfigError(problem)


def installation_problems(config: RunConfig) -> Iterator[str]:
    """One line for each setting that needs something that is not there, with its remedy after "; fix: "."""
    training = config.training
    needs: list[tuple[str, str, str]] = []
    if training.base_quantization != "none":
        needs.append(("training.base_quantization", training.base_quantization, "torchao"))
    if training.optimizer in ("adam8bit", "prodigy"):
        package = {"adam8bit": "torchao", "prodigy": "prodigyopt"}[training.optimizer]
        needs.append(("training.optimizer", training.optimizer, package))
    needs += [("training.trackers", tracker, tracker) for tracker in training.trackers]
    for key, value, package in needs:
        if importlib.util.find_spec(package) is None:
            yield (
                f"{key}: got {value}, which needs the package {package}; fix: "
                f"pip install {_package_of(package)}, or leave it out"
            )
    if (training.compile or training.optimizer == "adam8bit") and not _has_compiler():
        key = "training.compile: got true" if training.compile else "training.optimizer: got adam8bit"
        named = os.environ.get("CXX")
        fix = f"CXX names {named}, which cannot be run; unset it" if named else "install g++ or set CXX"
        yield f"{key}, which needs a C++ compiler; fix: {fix}, or leave it out"
    if "wandb" in training.trackers and (problem := _wandb_problem()) is not None:
        yield f"training.trackers: got wandb, which {problem}"


def _package_of(package: str) -> str:
    return f'"stepdistill[{_EXTRAS[package]}]"' if package in _EXTRAS else package


def _has_compiler() -> bool:
    """Whether there is the compiler that torch takes: CXX, or else the platform's."""
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    return shutil.which(os.environ.get("CXX") or usual) is not None


def _wandb_problem() -> str | None:
    """What keeps wandb from logging, or None."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return None
    url = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL") or _WANDB_URL)
    if not os.environ.get("WANDB_API_KEY") and not _has_login(url.hostname or ""):
        return "has no account here; fix: `wandb login`, or WANDB_MODE=offline in the environment"
    try:
        socket.create_connection((url.hostname, url.port or 443), timeout=_MAX_SECONDS).close()
    except OSError:
        return f"cannot reach {url.hostname}; fix: WANDB_MODE=offline in the environment, or leave it out"
    return None


def _has_login(host: str) -> bool:
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
