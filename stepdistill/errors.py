"""Errors that end a command in one line on standard error, and the exit code of each. No torch.

    0    done
    1    an error of the program itself, with its traceback
    2    a wrong config, argument or file
    3    another process works in the run's folder
    4    the data cannot be used
    5    a checkpoint cannot be used, or could not be written before a stop
    6    a loss, gradient or image is not finite
    7    out of memory; in training: even with micro-batches of one sample
    8    another process of the launch ended, or did not answer in time
    75   stopped in the middle of training; the same command continues there
    130  Ctrl-C; the same command continues

A ValueError that this package raises is a message to the user as well, with exit code 2.
"""

TO_BE_CONTINUED, INTERRUPTED = 75, 130
"""EX_TEMPFAIL of sysexits.h, which schedulers take as "start it again", and a shell's code for SIGINT."""


class FolderInUseError(ValueError):
    """Another process works in the run's folder."""

    exit_code = 3


class DataError(ValueError):
    """The data cannot be used: too much of it is damaged, or files are missing."""

    exit_code = 4


class CheckpointError(ValueError):
    """A checkpoint cannot be used: it belongs to something else, cannot be read, or could not be written before a stop.

    Damaged checkpoints are passed over with a warning; if all of them are damaged, the rung is trained from its start."""

    exit_code = 5


class NonFiniteError(RuntimeError):
    """A loss, gradient or image is not finite."""

    exit_code = 6


class OutOfMemoryError(RuntimeError):
    """The memory does not hold an update, even with one sample in a micro-batch. Other stages raise torch's error."""

    exit_code = 7


class DistributedError(RuntimeError):
    """Another process of the launch ended, or did not answer in time."""

    exit_code = 8


class ToBeContinued(Exception):
    """Training stopped between two updates, with its state on disk; `exit_code` is the command's."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class StoppedAlone(ToBeContinued):
    """A signal stopped this process outside training, where the processes of a launch do not agree on stops."""


EXPECTED = (NonFiniteError, OutOfMemoryError, DistributedError, ToBeContinued)
"""The errors, besides ValueErrors of this package, whose message stands for itself: no traceback is shown."""
