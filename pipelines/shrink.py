"""Stage 2 of a run with a `shrink` section: make the smaller base model, on which the ladder then climbs.

python pipelines/shrink.py CONFIG [key=value ...]
"""

import sys

from stepdistill.cli import app, guarded


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    return guarded(lambda: app(["shrink", *arguments], prog_name="stepdistill"))


if __name__ == "__main__":
    sys.exit(main())
