"""Numbers as JSON has them: whether they are any, and how they are written."""

import math
from typing import Any

Number = int | float
MISSING = "–"


def number(value: Any) -> Number | None:
    """The value where it is a finite number, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def format_number(value: Any, spec: str) -> str:
    """The number in its format; a dash where there is none."""
    numeric = number(value)
    if numeric is None:
        return MISSING
    try:
        return format(numeric, spec)
    except ValueError:
        return f"{numeric:g}"


def steps_text(steps: int) -> str:
    """ "4 steps"."""
    return "1 step" if steps == 1 else f"{steps} steps"


def percent(share: float) -> str:
    """A share as percent, with a digit behind the point where there is one to show."""
    return f"{share:.1%}".replace(".0%", "%").replace("%", " %")
