"""One result of `stepdistill doctor`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """ok, note (the run will work, but look at this) or problem (the run will not work); what was found, and the remedy."""

    state: Literal["ok", "note", "problem"]
    about: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.state:<8} {self.about}" + (f"\n         fix: {self.remedy}" if self.remedy else "")
