"""Prints the packages of constraints.txt as requirements with the sha256 of their wheels, as PyPI's index has them:

    .venv/bin/python .ci/write_hashes.py > .ci/hashes.txt

torch is left out: its wheel differs between CPUs and GPUs, and comes from other indexes too.
"""

import json
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import Version

INDEX, JSON = "https://pypi.org/simple/{}/", "application/vnd.pypi.simple.v1+json"
WITHOUT = ("torch",)
PYTHONS = ("cp311", "cp312", "cp313", "cp314")


def is_needed(filename: str, version: Version) -> bool:
    """Whether a file is a wheel of this version for one of PYTHONS, or for every Python 3."""
    try:
        _, its_version, _, tags = parse_wheel_filename(filename)
    except InvalidWheelFilename:  # not a wheel, or one from before names had rules
        return False
    interpreters = any(t.interpreter in PYTHONS or t.abi in ("abi3", "none") for t in tags)
    return its_version == version and interpreters


def requirement(pin: str) -> str:
    """`name==version` with a --hash for each wheel; ValueError if the version has none."""
    name, version = pin.split("==")
    request = urllib.request.Request(INDEX.format(canonicalize_name(name)), headers={"Accept": JSON})
    with urllib.request.urlopen(request, timeout=60) as answer:
        files = json.load(answer)["files"]
    hashes = sorted(f["hashes"]["sha256"] for f in files if is_needed(f["filename"], Version(version)))
    if not hashes:
        raise ValueError(f"{pin} has no wheel; allowed: packages with wheels, as no build script is run")
    return " \\\n".join([pin, *(f"    --hash=sha256:{digest}" for digest in hashes)])


def main() -> None:
    """Prints the requirements in the order of constraints.txt."""
    lines = Path("constraints.txt").read_text().split()
    pins = [line for line in lines if line.split("==")[0] not in WITHOUT]
    with ThreadPoolExecutor(8) as pool:
        sys.stdout.writelines(f"{text}\n" for text in pool.map(requirement, pins))


if __name__ == "__main__":
    main()
