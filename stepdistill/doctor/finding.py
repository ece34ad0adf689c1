"""A line of `stepdistill doctor`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One line: ok, note (it runs, but look at it) or problem (it will not run), and what to do."""

    state: Literal["ok", "note", "problem"]
    about: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.state:<8} {self.about}" + (f"\n         mend: {self.remedy}" if self.remedy else "")
