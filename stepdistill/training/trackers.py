"""Sends the numbers of every update, and the preview images, to the trackers that the config names, through accelerate.

A tracker must not stop a training: one that fails after it began, such as for lack of a network, is named in a warning and
left out. Whether it can begin at all is checked before anything is loaded (config/installed.py).
"""

import functools
import logging
import secrets
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from PIL import Image

from stepdistill.config import RunConfig
from stepdistill.config.saved import resolved
from stepdistill.disk.durable import write_text
from stepdistill.messages import first_line
from stepdistill.run.settings import flat

logger = logging.getLogger(__name__)
PROJECT = "stepdistill"
FOLDER = "trackers"
"""Folder in the run's folder for what trackers write."""


def _tensorboard(config: RunConfig, folder: Path) -> GeneralTracker:
    return TensorBoardTracker(config.name, str(folder))


def _wandb(config: RunConfig, folder: Path) -> GeneralTracker:
    return WandBTracker(PROJECT, name=config.name, id=_run_id(folder), dir=str(folder), resume="allow")


def _run_id(folder: Path) -> str:
    """A random name of this run, kept in its folder, with which wandb continues its curves."""
    file = folder / "wandb_id"
    if not file.is_file():
        write_text(file, secrets.token_hex(8))
    return file.read_text().strip()


def _trackio(config: RunConfig, _folder: Path) -> GeneralTracker:
    return TrackioTracker(PROJECT, name=config.name, resume="allow")


_KINDS: dict[str, Callable[[RunConfig, Path], GeneralTracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}


def _send_image(name: str, tracker: Any, pixels: np.ndarray, step: int) -> None:
    """Sends an image, uint8 (1, H, W, 3), in the way that this tracker takes one."""
    if name == "trackio":
        import trackio

        tracker.log({"preview": trackio.Image(pixels[0])}, step=step)
    else:
        options = {"dataformats": "NHWC"} if name == "tensorboard" else {}
        tracker.log_images({"preview": pixels}, step=step, **options)


class Trackers:
    """The trackers of a run, in the one process that writes files.

    A step is the number of updates since the ladder's first one, so the curves of all rungs follow one another.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._open: dict[str, GeneralTracker] = {}
        folder = config.run_dir / FOLDER
        for name in config.training.trackers:
            folder.mkdir(parents=True, exist_ok=True)
            self._try(name, functools.partial(self._start, name, folder))

    def _start(self, name: str, folder: Path) -> None:
        tracker = _KINDS[name](self._config, folder)
        tracker.start()
        settings = {key: value for key, value in flat(resolved(self._config)).items() if _is_plain(value)}
        tracker.store_init_configuration(settings)
        self._open[name] = tracker

    def log(self, student_steps: int, phase: int, step: int, numbers: Mapping[str, float]) -> None:
        """Sends the numbers of update number `step`, counted from 1, of a phase of the rung with these steps."""
        place = self._place(student_steps, phase) + step
        for name, tracker in list(self._open.items()):
            self._try(name, functools.partial(tracker.log, dict(numbers), step=place))

    def image(self, student_steps: int, phase: int, step: int, path: Path) -> None:
        """Sends a preview image."""
        if not self._open or not path.is_file():
            return
        place = self._place(student_steps, phase) + step
        with Image.open(path) as file:
            pixels = np.asarray(file.convert("RGB"))[None]
        for name, tracker in list(self._open.items()):
            self._try(name, functools.partial(_send_image, name, tracker, pixels, place))

    def close(self) -> None:
        """Ends all trackers."""
        for name, tracker in list(self._open.items()):
            self._try(name, tracker.finish)
        self._open.clear()

    def _place(self, student_steps: int, phase: int) -> int:
        """Number of updates before a phase."""
        before = 0
        for rung in self._config.ladder:
            ended = rung.phases[:phase] if rung.student_steps == student_steps else rung.phases
            before += sum(of_rung.max_train_steps for of_rung in ended)
            if rung.student_steps == student_steps:
                break
        return before

    def _try(self, name: str, action: Callable[[], object]) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                action()
        except Exception as error:  # each library has errors of its own
            self._open.pop(name, None)
            logger.warning("distill: the tracker %s failed and is left out: %s", name, first_line(error))


def _is_plain(value: object) -> bool:
    return isinstance(value, str | bool | int | float)
