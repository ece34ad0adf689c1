"""Values read from JSON: whether they are numbers, and how the report writes them."""

import math
from typing import Any

Number = int | float
MISSING = "–"


def number(value: Any) -> Number | None:
    """The value if it is a finite number, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def format_number(value: Any, spec: str) -> str:
    """The number in the format `spec`; a dash if the value is not a number. An invalid spec falls back to "g"."""
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
    """A share (0 to 1) as percent, with one decimal unless it is 0: "8 %", "8.5 %"."""
    return f"{share:.1%}".replace(".0%", "%").replace("%", " %")
