"""Whether what a config asks for is installed on this machine; looked at before anything is loaded. No torch."""

import importlib.util
import netrc
import os
import shutil
from collections.abc import Iterator

from stepdistill.config.section import ConfigError
from stepdistill.config.sections import RunConfig

_COMPILERS = ("g++", "c++", "clang++", "cl")
_EXTRAS = {"torchao": "quantize", "prodigyopt": "prodigy", "tensorboard": "trackers"}
_WANDB_HOST = "api.wandb.ai"


def check_installed(config: RunConfig) -> None:
    """ConfigError for a setting that needs a package, a compiler or an account that is not there."""
    for problem in _problems(config):
        raise ConfigError(problem)


def _problems(config: RunConfig) -> Iterator[str]:
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
        yield f"{key}, which needs a C++ compiler; fix: install g++ or set CXX, or leave it out"
    if "wandb" in training.trackers and not _wandb_can_log():
        yield (
            "training.trackers: got wandb, which has no account here; fix: `wandb login`, or WANDB_MODE=offline in the "
            "environment"
        )


def _package_of(package: str) -> str:
    return f'"stepdistill[{_EXTRAS[package]}]"' if package in _EXTRAS else package


def _has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), *_COMPILERS) if name)


def _wandb_can_log() -> bool:
    if os.environ.get("WANDB_MODE") in ("offline", "disabled") or os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(_WANDB_HOST) is not None
    except (OSError, netrc.NetrcParseError):
        return False
