"""`stepdistill run|prepare|distill|export|evaluate|report|sample`: the stages as one command.

A mistake of the user's is one line on standard error and exit code 2; torch is imported only after the config is right.
"""

import errno
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
import yaml

from stepdistill import plan, stages
from stepdistill.config import ConfigError, RunConfig
from stepdistill.config.load import load_config
from stepdistill.config.saved import resolved
from stepdistill.disk.places import is_folder
from stepdistill.messages import printable, short
from stepdistill.run.rungs import finished_rungs

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Distil a diffusers text-to-image model to 8, 4, 2 or 1 steps: a LoRA per rung, and a table of what it cost.",
)
ConfigPath = Annotated[Path, typer.Argument(help="the YAML file of a run, such as configs/letters.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value, such as training.train_batch_size=16")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the resolved config and what would run")]
RungOption = Annotated[str | None, typer.Option("--rung", help="one rung anew, such as 32:8")]


def parse_rung(text: str | None) -> tuple[int, int] | None:
    """ "32:8" as (32, 8); ConfigError for another form."""
    if text is None:
        return None
    teacher, separator, student = text.partition(":")
    if not (separator and re.fullmatch("[0-9]{1,4}", teacher) and re.fullmatch("[0-9]{1,4}", student)):
        raise ConfigError(f"--rung: got {short(text)}; allowed: TEACHER:STUDENT, such as 32:8")
    return int(teacher), int(student)


def _stage(
    config_path: Path,
    overrides: list[str] | None,
    dry_run: bool,
    stage: Callable[[RunConfig], object],
    *,
    planned: Sequence[str] = plan.STAGES,
    only: tuple[int, int] | None = None,
) -> None:
    """Runs a stage, or prints the config and what `planned` stages would do."""
    config = load_config(config_path, overrides)
    stages.check_run(config)
    if not dry_run:
        stage(config)
        return
    described = plan.describe(
        config,
        stages=planned,
        only=only,
        finished=finished_rungs(config.run_dir),
        seconds_per_pass=plan.measured_seconds_per_pass(config),
    )
    typer.echo(yaml.safe_dump(resolved(config), sort_keys=False) + "\n" + described)


@app.command()
def run(config: ConfigPath, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """All stages in sequence; interrupted, the same command goes on at the last finished rung."""
    _stage(config, overrides, dry_run, stages.run_all)


@app.command()
def doctor(config: ConfigPath, overrides: Overrides = None) -> None:
    """What would stop this run, in seconds: teacher, data, packages, device, disk; each with its remedy."""
    stages.doctor(load_config(config, overrides))


@app.command()
def prepare(config: ConfigPath, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Latents and text embeddings into the run's cache."""
    _stage(config, overrides, dry_run, stages.prepare, planned=("prepare",))


@app.command()
def distill(
    config: ConfigPath, overrides: Overrides = None, rung: RungOption = None, dry_run: DryRun = False
) -> None:
    """The rungs that are not finished, in order, or one of them anew."""
    only = parse_rung(rung)
    _stage(
        config, overrides, dry_run, lambda c: stages.distill(c, only=only), planned=("distill",), only=only
    )


@app.command()
def export(
    config: Annotated[Path, typer.Argument(metavar="RUN | CONFIG", help="a run's folder, or its YAML file")],
    overrides: Overrides = None,
    steps: Annotated[
        list[int] | None, typer.Option(help="one rung; may be given several times; all without")
    ] = None,
    formats: Annotated[
        str | None, typer.Option("--format", help="of diffusers,kohya,fused,onnx; export.formats without")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="a lower rank, by singular values")] = None,
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="the rung's folder to the Hub; with one --steps")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Scheduler, card and the LoRA in other tools' formats, in every rung's folder."""
    asked = [] if formats is None else [f"export.formats=[{formats}]"]
    asked += [] if rank is None else [f"export.rank={rank}"]
    run_config = load_config(config, [*(overrides or []), *asked])
    stages.check_run(run_config)
    stages.export(run_config, steps=steps, push_to=push, dry_run=dry_run)


@app.command()
def extract(
    base: Annotated[Path, typer.Argument(help="a pipeline's folder: what the LoRA will be loaded onto")],
    tuned: Annotated[Path, typer.Argument(help="a folder, or a U-Net's, of the same model trained further")],
    output: Annotated[Path, typer.Option(help="the folder to write")],
    rank: Annotated[int, typer.Option(min=1, help="of every layer")] = 64,
) -> None:
    """A LoRA out of a U-Net that was trained whole, by singular values."""
    stages.extract(base, tuned, rank=rank, output=output)


@app.command()
def evaluate(config: ConfigPath, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Images and numbers of the teacher and of every rung."""
    _stage(config, overrides, dry_run, stages.evaluate, planned=("evaluate",))


@app.command()
def report(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN [RUN ...] | CONFIG [key=value ...]", help="run folders, or the config of one"
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(help="the folder to write; RUN/report where not given")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """The page, the table and the picture of a run, still training or not; of several runs, a comparison."""
    if is_folder(Path(targets[0])):
        stages.report_runs([Path(target) for target in targets], output=output)
    else:
        _stage(
            Path(targets[0]),
            targets[1:],
            dry_run,
            lambda config: stages.report(config, output=output),
            planned=("report",),
        )


@app.command()
def sample(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="a run's folder, such as runs/letters")],
    prompt: Annotated[str, typer.Option(help="what to draw")],
    steps: Annotated[int, typer.Option(min=1, help="the rung")] = 4,
    seed: Annotated[int, typer.Option(help="of the noise")] = 0,
    output: Annotated[Path, typer.Option(help="the PNG to write")] = Path("sample.png"),
) -> None:
    """One picture by a run's student."""
    typer.echo(stages.sample(run_dir, steps=steps, prompt=prompt, seed=seed, output=output))


def guarded(command: Callable[[], object]) -> int:
    """Runs a command; a user's mistake becomes one line and exit code 2, numbers not finite 1, an interruption 130."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("stepdistill").setLevel(logging.INFO)
    try:
        command()
    except ValueError as error:
        if not _raised_here(error):
            raise
        print(f"stepdistill: {printable(str(error))}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        from stepdistill.training.optim import NonFiniteError

        if not isinstance(error, NonFiniteError):
            raise
        print(f"stepdistill: {printable(str(error))}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        where = f"{error.filename!r}: " if error.filename is not None else ""
        print(
            f"stepdistill: cannot use a file: {where}{os.strerror(error.errno)}; {_SEE_TO_IT}",
            file=sys.stderr,
        )
        return 2
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 0
    except KeyboardInterrupt:
        print("stepdistill: interrupted; the same command goes on at the last finished rung", file=sys.stderr)
        return 130
    return 0


_OF_THE_DISK = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS),
    *(errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR),
)
"""What no file's reader or writer named before: a mistake in a path, or a disk that fails."""
_SEE_TO_IT = "mend: make room there, allow this user to use it, or name another path"


def _raised_here(error: BaseException) -> bool:
    """True for a ValueError of this package, which is a message to the user; others keep their traceback."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and Path(trace.tb_frame.f_code.co_filename).is_relative_to(Path(__file__).parent)


def _flushed(code: int) -> int:
    """The exit code, another one where what was printed could not be written, such as into a file on a full disk."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python says it again as it ends
        if error.errno != errno.EPIPE:  # whoever reads has read enough
            print(f"stepdistill: cannot write the output: {os.strerror(error.errno or 0)}", file=sys.stderr)
        return code or 2
    return code


def main() -> None:
    """The console entry point."""
    sys.exit(_flushed(guarded(app)))
