"""Compares the LoRAs of the golden cases between a commit and this tree, bit for bit, on this machine.

    python tests/golden/compare.py COMMIT [--only NAME ...] [--work FOLDER]

Checks COMMIT out into a temporary worktree, runs the same cases with both, and names each rung that differs. The exit code
is 1 if a rung differs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
CASES = REPOSITORY / "tests" / "golden" / "cases.py"


def differences(before: dict[str, dict[str, str]], after: dict[str, dict[str, str]]) -> list[str]:
    """One line per rung whose weights differ or that is missing on one side."""
    lines = []
    for name in sorted(before.keys() | after.keys()):
        first, second = before.get(name, {}), after.get(name, {})
        for steps in sorted(first.keys() | second.keys(), key=int, reverse=True):
            if first.get(steps) != second.get(steps):
                lines.append(f"{name}, {steps}-step rung: {first.get(steps)} before, {second.get(steps)} now")
    return lines


def has_commit(commit: str) -> bool:
    """Whether this repository has the commit; a shallow clone may lack it."""
    git = ["git", "-C", str(REPOSITORY), "cat-file", "-e", f"{commit}^{{commit}}"]
    return subprocess.run(git, capture_output=True, check=False).returncode == 0


def run_cases(tree: Path, work: Path, output: Path, only: list[str] | None) -> dict[str, dict[str, str]]:
    """The digests of this tree's cases, run with the package in `tree`."""
    command = [sys.executable, str(CASES), str(work), "--output", str(output)]
    command += ["--only", *only] if only else []
    environment = os.environ | {"PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    completed = subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    if completed.returncode:
        raise RuntimeError(f"the cases failed in {tree}:\n{completed.stderr[-3000:]}")
    return json.loads(output.read_text())["cases"]


def compare(commit: str, work: Path, only: list[str] | None = None) -> list[str]:
    """The differences between a commit and this tree. RuntimeError if a case fails on one of them."""
    with tempfile.TemporaryDirectory() as scratch:
        other = Path(scratch) / "commit"
        git = ["git", "-C", str(REPOSITORY), "worktree"]
        subprocess.run([*git, "add", "--detach", str(other), commit], check=True, capture_output=True)
        try:
            # this tree first, because it builds the inputs of both
            after = run_cases(REPOSITORY, work, Path(scratch) / "after.json", only)
            before = run_cases(other, work, Path(scratch) / "before.json", only)
        finally:
            subprocess.run([*git, "remove", "--force", str(other)], check=True, capture_output=True)
    return differences(before, after)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compares the golden weights of a commit and of this tree.")
    parser.add_argument("commit")
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--work", type=Path)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        lines = compare(args.commit, args.work or Path(scratch), args.only)
    print("\n".join(lines) or "equal to the bit")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
