"""A scorer of somebody else's (HPS, ImageReward), run as a command: its old packages stay in its own environment."""

import json
import math
import shlex
import subprocess
from pathlib import Path


def run_score_cmd(command: str, *, images: Path, prompts: Path, timeout: float) -> dict[str, float]:
    """Runs `command` with {images} (a folder of 000000.png ..) and {prompts} (a prompt a line) filled in, without a
    shell, and reads the JSON object of numbers on its last line.

    ValueError in one line where it cannot start, fails, takes longer than `timeout` seconds or prints something else.
    """
    words = [
        word.replace("{images}", str(images)).replace("{prompts}", str(prompts))
        for word in shlex.split(command)
    ]
    if not words:
        raise ValueError("evaluation.score_cmd: got an empty command")
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=timeout)
    except OSError as error:
        raise ValueError(f"evaluation.score_cmd: cannot run {words[0]}: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise ValueError(f"evaluation.score_cmd: {words[0]} took longer than {timeout:.0f} s") from None
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise ValueError(
            f"evaluation.score_cmd: {words[0]} left with {done.returncode}: {said[-1] if said else 'no message'}"
        )
    lines = done.stdout.strip().splitlines()
    try:
        scores = json.loads(lines[-1] if lines else "")
        found = {str(name): float(value) for name, value in scores.items()}
    except (ValueError, AttributeError, TypeError):
        raise ValueError(
            f"evaluation.score_cmd: the last line of {words[0]} is {lines[-1][:80] if lines else ''!r}; "
            f"allowed: a JSON object of numbers"
        ) from None
    bad = [name for name, value in found.items() if not math.isfinite(value)]
    if bad:
        raise ValueError(f"evaluation.score_cmd: {bad[0]} is {found[bad[0]]}; allowed: finite numbers")
    return found
