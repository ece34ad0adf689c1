"""`stepdistill run|doctor|plan|prepare|distill|export|extract|merge|evaluate|report|sample`: the command line.

An error that a user can fix ends in one line on standard error; errors.py lists the exit codes. torch is imported only once
the config is valid.
"""

import contextlib
import errno
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
import yaml
from typer.core import TyperGroup

from stepdistill import launch, plan, stages
from stepdistill.config import ConfigError, RunConfig
from stepdistill.config.load import load_config
from stepdistill.config.saved import resolved
from stepdistill.disk.places import is_folder
from stepdistill.errors import (
    EXPECTED,
    INTERRUPTED,
    TO_BE_CONTINUED,
    DistributedError,
    OutOfMemoryError,
    StoppedAlone,
    ToBeContinued,
)
from stepdistill.messages import first_line, short, without_secrets
from stepdistill.run.rungs import finished_rungs
from stepdistill.terminal import given_text, one_line, prepare_terminal, printable_lines, show_traceback


class _Commands(TyperGroup):
    """The commands. Turns Ctrl-C and SIGTERM into StoppedAlone, before typer would end the process with a message of its
    own, and makes what typer says about wrong arguments printable."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _printable_message():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        try:
            with _printable_message():
                return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise _stopped("SIGTERM" if isinstance(stop, _Terminated) else "Ctrl-C") from None


def _stopped(name: str) -> StoppedAlone:
    code = TO_BE_CONTINUED if name == "SIGTERM" else INTERRUPTED
    return StoppedAlone(f"stopped ({name}); the same command continues with what is finished", code)


@contextlib.contextmanager
def _printable_message() -> Iterator[None]:
    """Escapes control characters in the message of typer's errors, which repeat wrong arguments."""
    try:
        yield
    except Exception as error:
        message = getattr(error, "message", None)
        if isinstance(message, str):
            error.message = one_line(message)  # type: ignore[attr-defined]
        raise


class _Terminated(KeyboardInterrupt):
    """SIGTERM; like Ctrl-C, it is not an Exception, so that no code on the way takes it for an error that it can handle."""


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Distil a diffusers text-to-image model to 8, 4, 2 or 1 steps: a LoRA for each, and a table of what each costs.",
)
ConfigPath = Annotated[
    Path,
    typer.Argument(
        help="the YAML file of a run, or the name of a config that ships with stepdistill, such as letters"
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value, such as training.train_batch_size=16")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="print the resolved config and what would run, and stop")
]
RungOption = Annotated[
    str | None, typer.Option("--rung", help="train this rung alone, even if it is finished, such as 32:8")
]


def parse_rung(text: str | None) -> tuple[int, int] | None:
    """(32, 8) for "32:8"; ConfigError for any other form."""
    if text is None:
        return None
    teacher, separator, student = text.partition(":")
    if not (separator and re.fullmatch("[0-9]{1,4}", teacher) and re.fullmatch("[0-9]{1,4}", student)):
        raise ConfigError(f"--rung: got {short(text)}; allowed: TEACHER:STUDENT, such as 32:8")
    return int(teacher), int(student)


def parse_weights(text: str | None) -> list[float] | None:
    """[3.0, 1.0] for "3,1"; ConfigError for any other form."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"--weights: got {short(text)}; allowed: numbers with commas, such as 3,1"
        ) from None


def _stage(
    config_path: Path,
    overrides: list[str] | None,
    dry_run: bool,
    stage: Callable[[RunConfig], object],
    *,
    planned: Sequence[str] = plan.STAGES,
    only: tuple[int, int] | None = None,
) -> None:
    """Runs a stage; with dry_run prints the config and what the `planned` stages would do instead."""
    config = _load(config_path, overrides)
    if not dry_run:
        stage(config)
        return
    stages.check_run(config)
    if planned == ("shrink",):
        stages.check_has_shrink(config)
    described = plan.describe(
        config,
        stages=planned,
        only=only,
        finished=finished_rungs(config.run_dir),
        seconds_per_pass=plan.measured_seconds_per_pass(config),
    )
    typer.echo(printable_lines(yaml.safe_dump(resolved(config), sort_keys=False) + "\n" + described))
    typer.echo(
        "not checked here: data, weights, taps, teachers, exports and table; `stepdistill doctor` checks them"
    )


def _load(config_path: Path, overrides: list[str] | None) -> RunConfig:
    return load_config(config_path, list(map(given_text, overrides or [])))


@app.command()
def run(config: ConfigPath, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Run all stages in sequence. After an interruption the same command continues where it stopped."""
    began = time.monotonic()
    _stage(config, overrides, dry_run, lambda c: stages.run_all(c, began=began))


@app.command()
def doctor(config: ConfigPath, overrides: Overrides = None) -> None:
    """Check in seconds what would stop this run (teacher, data, packages, device, disk) and print the remedies."""
    stages.doctor(_load(config, overrides))


@app.command("plan")
def plan_command(
    config: ConfigPath,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="a card such as h100 or rtx4090, or a size such as 24GB; default: the one in this machine"
        ),
    ] = None,
    cards: Annotated[int, typer.Option(min=1, help="how many such cards train together")] = 1,
    price: Annotated[float | None, typer.Option(min=0, help="of an hour of one card, for the cost")] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure", help="also make two updates a phase here, with random weights, and compare"
        ),
    ] = False,
) -> None:
    """Tell whether this run fits a GPU, how long it takes and what it costs; needs neither GPU nor weights."""
    stages.print_plan(_load(config, overrides), gpu=gpu, cards=cards, price=price, measure=measure)


@app.command()
def prepare(config: ConfigPath, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Write latents and text embeddings into the run's cache."""
    _stage(config, overrides, dry_run, stages.prepare, planned=("prepare",))


@app.command()
def shrink(config: ConfigPath, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Make the smaller base model that the config's `shrink` section asks for."""
    began = time.monotonic()
    _stage(config, overrides, dry_run, lambda c: stages.shrink(c, began=began), planned=("shrink",))


@app.command()
def distill(
    config: ConfigPath, overrides: Overrides = None, rung: RungOption = None, dry_run: DryRun = False
) -> None:
    """Train the unfinished rungs in order, or one rung again."""
    began, only = time.monotonic(), parse_rung(rung)
    _stage(
        config,
        overrides,
        dry_run,
        lambda c: stages.distill(c, only=only, began=began),
        planned=("distill",),
        only=only,
    )


@app.command()
def export(
    config: Annotated[Path, typer.Argument(metavar="RUN | CONFIG", help="a run's folder, or its YAML file")],
    overrides: Overrides = None,
    steps: Annotated[
        list[int] | None, typer.Option(help="export this rung; may be repeated; default: all finished rungs")
    ] = None,
    formats: Annotated[
        str | None,
        typer.Option("--format", help="any of diffusers,kohya,fused,onnx; default: export.formats"),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="reduce to this lower rank by singular values")] = None,
    quantize: Annotated[
        str | None, typer.Option(help="int8: also the ONNX U-Net with 8-bit weights and activations")
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="upload the rung to this Hub repository; needs one --steps"),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Write scheduler, model card and the LoRA in other tools' formats into every rung's folder."""
    asked = [] if formats is None else [f"export.formats=[{formats}]"]
    asked += [] if rank is None else [f"export.rank={rank}"]
    asked += [] if quantize is None else [f"export.quantize={quantize}"]
    run_config = _load(config, [*(overrides or []), *asked])
    stages.export(run_config, steps=steps, push_to=push, dry_run=dry_run)


@app.command()
def extract(
    base: Annotated[
        Path, typer.Argument(help="the folder of the pipeline that the LoRA will be loaded into")
    ],
    tuned: Annotated[Path, typer.Argument(help="the folder of the fine-tuned pipeline, or of its U-Net")],
    output: Annotated[Path, typer.Option(help="the folder to write")],
    rank: Annotated[int, typer.Option(min=1, help="rank of every layer")] = 64,
) -> None:
    """Turn a fully fine-tuned U-Net into a LoRA by singular values."""
    stages.extract(base, tuned, rank=rank, output=output)


@app.command()
def merge(
    sources: Annotated[
        list[Path], typer.Argument(metavar="RUN | LORA ...", help="runs, or rungs' folders and LoRA files")
    ],
    output: Annotated[
        Path, typer.Option(help="the new folder to write: a rung, or of runs a folder of rungs")
    ],
    weights: Annotated[
        str | None, typer.Option(help="of each source, such as 3,1; only ratios matter; default: equal")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="of the result; default: the largest of the sources")
    ] = None,
) -> None:
    """Average what LoRAs change, such as those of sites that train on their own pictures."""
    stages.merge(sources, output=output, weights=parse_weights(weights), rank=rank)


@app.command()
def evaluate(config: ConfigPath, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Draw and measure images of the teacher and of every rung."""
    _stage(config, overrides, dry_run, stages.evaluate, planned=("evaluate",))


@app.command()
def report(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN [RUN ...] | CONFIG [key=value ...]",
            help="one or more run folders, or the config of a run",
        ),
    ],
    output: Annotated[Path | None, typer.Option(help="the folder to write; default: RUN/report")] = None,
    dry_run: DryRun = False,
) -> None:
    """Write the report of a run (page, table, image grid), also while it trains; for several runs, a comparison."""
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
    prompt: Annotated[str, typer.Option(help="the prompt")],
    steps: Annotated[int, typer.Option(min=1, help="number of steps: which rung to draw with")] = 4,
    seed: Annotated[int, typer.Option(help="seed of the noise")] = 0,
    output: Annotated[Path, typer.Option(help="the PNG to write")] = Path("sample.png"),
) -> None:
    """Draw one image with a run's student."""
    written = stages.sample(run_dir, steps=steps, prompt=given_text(prompt), seed=seed, output=output)
    typer.echo(one_line(str(written)))


_OF_THE_COMPILER = ("InductorError", "BackendCompilerFailed")  # torch's
_COMPILER_REMEDY = (
    "fix: remove torch's folder of compiled code, which a kill in the middle of compiling leaves damaged "
    "(TORCHINDUCTOR_CACHE_DIR, or torchinductor_USER in the folder for temporary files), or training.compile=false"
)


def guarded(command: Callable[[], object]) -> int:
    """Runs a command and returns its exit code, as listed in errors.py; all but errors of the program itself are reported
    in one line."""
    prepare_terminal(logging.WARNING)
    logging.getLogger("stepdistill").setLevel(logging.INFO)
    try:
        return _exit_code(command)
    except Exception as error:
        if launch.is_of_another_process(error):
            return _ended(first_line(error), DistributedError.exit_code)
        launch.tell(error)
        raise


def _exit_code(command: Callable[[], object]) -> int:
    try:
        with _terminable():
            command()
    except ValueError as error:
        if isinstance(error, UnicodeEncodeError) and error.encoding == sys.getfilesystemencoding():
            return _ended(_ENCODING.format(error.object, error.encoding), 2)
        if not _raised_here(error):
            raise
        return _ended(str(error), getattr(error, "exit_code", 2))
    except EXPECTED as error:
        return _ended(str(error), error.exit_code, is_agreed=type(error) is ToBeContinued)
    except RuntimeError as error:
        if type(error).__name__ in _OF_THE_COMPILER:
            return _ended(f"torch.compile: {first_line(error)}; {_COMPILER_REMEDY}", 2)
        if type(error).__name__ != OutOfMemoryError.__name__:  # torch's, which is not imported here
            raise
        return _ended(f"out of memory: {first_line(error)}; {_MEMORY_REMEDY}", OutOfMemoryError.exit_code)
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        where = f"{error.filename!r}: " if error.filename is not None else ""
        return _ended(f"cannot use a file: {where}{os.strerror(error.errno)}; {_FILE_REMEDY}", 2)
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 0
    return 0


def _ended(message: str, code: int, *, is_agreed: bool = False) -> int:
    """Prints an error's line, once for all processes of a launch, and returns the exit code. is_agreed: whether all of them
    stop now."""
    line, code = launch.ending(without_secrets(message), code, is_agreed=is_agreed)
    if line is not None:
        print(f"stepdistill: {one_line(line)}", file=sys.stderr)
    return code


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Lets SIGTERM raise _Terminated in the main thread. While a rung trains, run/stop.py handles it instead.

    A library that was being imported may turn it into an error of its own; that error becomes StoppedAlone.
    """
    came: list[int] = []

    def terminate(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except Exception as error:
        if came and not isinstance(error, ToBeContinued):
            raise _stopped("SIGTERM") from error
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


_OF_THE_DISK = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS),
    *(errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR),
)
"""errno of errors that no reader or writer of files has turned into a message: a wrong path, or a failing disk."""
_ENCODING = (
    "the name {!r} cannot be written in {}, which Python takes for the encoding of file names here; fix: set PYTHONUTF8=1, "
    "or use another name"
)
_MEMORY_REMEDY = (
    "fix: end other programs that use the GPU; or a lower evaluation.batch_size (evaluate); or another run (name=...) with "
    "data.vae_dtype=bfloat16 and data.text_dtype=bfloat16 (prepare)"
)
_FILE_REMEDY = "fix: make room there, allow this user to use it, or name another path"


def _raised_here(error: BaseException) -> bool:
    """Whether this package raised the error: its ValueErrors are messages to the user, others keep their traceback."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and Path(trace.tb_frame.f_code.co_filename).is_relative_to(Path(__file__).parent)


def _flushed(code: int) -> int:
    """The exit code after flushing stdout; 2 in place of 0 if the output could not be written, as on a full disk."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # without this, Python would report the error again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno != errno.EPIPE:  # after EPIPE nobody reads the output any more
            print(f"stepdistill: cannot write the output: {os.strerror(error.errno or 0)}", file=sys.stderr)
        return code or 2
    return code


def main() -> None:
    """The console entry point."""
    sys.excepthook = show_traceback
    logging.captureWarnings(True)
    sys.exit(_flushed(guarded(app)))
