"""Stage 5: write the report: page, table and image grid.

python pipelines/report.py CONFIG [key=value ...] [--dry-run]
"""

import sys

from stepdistill.cli import app, guarded


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    return guarded(lambda: app(["report", *arguments], prog_name="stepdistill"))


if __name__ == "__main__":
    sys.exit(main())
