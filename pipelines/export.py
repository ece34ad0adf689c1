"""Stage 3: write scheduler, model card and the LoRA in other tools' formats into every rung's folder.

python pipelines/export.py CONFIG [key=value ...] [--steps N] [--format diffusers,kohya,fused,onnx] [--rank R] [--dry-run]
"""

import sys

from stepdistill.cli import app, guarded


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    return guarded(lambda: app(["export", *arguments], prog_name="stepdistill"))


if __name__ == "__main__":
    sys.exit(main())
