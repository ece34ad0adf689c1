"""Stage 2: train the ladder rung by rung; `--rung 32:8` trains that rung again.

python pipelines/distill.py CONFIG [--rung 32:8] [key=value ...] [--dry-run]
"""

import sys

from stepdistill.cli import app, guarded


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    return guarded(lambda: app(["distill", *arguments], prog_name="stepdistill"))


if __name__ == "__main__":
    sys.exit(main())
