"""What goes to the terminal: file names, prompts and errors of libraries can contain anything, but a terminal must get only
printable characters, in an encoding that it has. No torch.
"""

import copy
import io
import logging
import os
import sys
import traceback
from pathlib import Path
from types import TracebackType

from stepdistill.messages import printable, without_secrets


def printable_lines(text: str) -> str:
    """Text for a terminal: its lines stay apart, all other control characters and lone surrogates become escapes. It
    has no secrets."""
    return "\n".join(map(printable, without_secrets(text).split("\n")))


def one_line(text: str) -> str:
    """Text as one line for a terminal, without secrets: line ends become escapes too."""
    return printable(without_secrets(text))


class TerminalFormatter(logging.Formatter):
    """Formats log records for a terminal. A path or an error in a message becomes one line; line ends in the message itself
    and in texts stay."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text without control characters other than line ends."""
        shown = copy.copy(record)
        if isinstance(record.args, tuple):
            shown.args = tuple(
                one_line(str(part)) if isinstance(part, Path | BaseException) else part
                for part in record.args
            )
        return printable_lines(super().format(shown))


def prepare_terminal(level: int) -> None:
    """Sends log records of that level to standard error through TerminalFormatter, unless a handler is there already, and
    lets both streams write characters that their encoding lacks as escapes, in place of an error."""
    handler = logging.StreamHandler()
    handler.setFormatter(TerminalFormatter("%(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """sys.excepthook for errors of the program itself: the usual traceback, without control characters."""
    print(printable_lines("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def given_text(text: str) -> str:
    """A command line's argument as text. Where Python takes the terminal for ASCII (LC_ALL=C with PYTHONUTF8=0), it cannot
    decode other characters; nearly every terminal writes UTF-8."""
    try:
        return os.fsencode(text).decode("utf-8") if not text.isascii() else text
    except UnicodeError:
        return text
