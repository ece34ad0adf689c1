"""Runs a third-party scorer (HPS, ImageReward) as a command, so that its packages stay in an environment of their own."""

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

_SCRIPTS = (".py", ".sh")


def run_score_cmd(command: str, *, images: Path, prompts: Path, timeout: float) -> dict[str, float]:
    """Runs `command` without a shell; returns the scores by name, from the JSON object on the last line of its output.

    {images} in the command is replaced by a folder of 000000.png .., {prompts} by a file with one prompt per line.
    ValueError, with a message of one line, if it cannot start, fails, takes longer than `timeout` seconds, or prints
    anything else.
    """
    parts = _words(command)
    words = [part.replace("{images}", str(images)).replace("{prompts}", str(prompts)) for part in parts]
    code, stdout, stderr = _run(words, timeout)
    if code:
        errors = stderr.strip().splitlines()
        raise ValueError(
            f"evaluation.score_cmd: {words[0]} exited with code {code}: {errors[-1] if errors else 'no message'}"
        )
    lines = stdout.strip().splitlines()
    try:
        scores = {str(name): _number(value) for name, value in json.loads(lines[-1] if lines else "").items()}
    except (ValueError, AttributeError, TypeError, OverflowError, RecursionError):
        raise ValueError(
            f"evaluation.score_cmd: the last line of {words[0]} is {lines[-1][:80] if lines else ''!r}; "
            f"allowed: a JSON object of numbers"
        ) from None
    bad = [name for name, value in scores.items() if not math.isfinite(value)]
    if bad:
        raise ValueError(f"evaluation.score_cmd: {bad[0]} is {scores[bad[0]]}; allowed: finite numbers")
    return scores


def check_score_cmd(command: str) -> None:
    """ValueError if the command names a program or a script that is not there or may not be run; runs nothing."""
    program, *rest = _words(command)
    if shutil.which(program) is None:
        raise ValueError(
            f"evaluation.score_cmd: cannot run {program!r}: there is no such program that this user may execute; allowed: a "
            f"program of PATH, or the path of one"
        )
    script = next((word for word in rest if word.endswith(_SCRIPTS)), None)
    if script is not None and not Path(script).is_file():
        raise ValueError(f"evaluation.score_cmd: there is no file {script!r}; allowed: the path of a script")


def _words(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"evaluation.score_cmd: cannot read {command!r}: {error}") from None
    if not words:
        raise ValueError("evaluation.score_cmd: got an empty command")
    return words


def _run(words: list[str], timeout: float) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; after the timeout the command and every process that it started are killed."""
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise ValueError(f"evaluation.score_cmd: cannot run {words[0]}: {error.strerror}") from None
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except BaseException as error:  # Ctrl-C too: the command is in another process group and does not get it
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise ValueError(f"evaluation.score_cmd: {words[0]} took longer than {timeout:.0f} s") from None
        raise
    return process.returncode, stdout, stderr


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(value)
    return float(value)
