"""The check of a number that configurations share."""

from __future__ import annotations

import math

from sealion_jax.errors import UserError


def check_number(
    name: str,
    value: object,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    whole: bool = False,
) -> None:
    """Refuses what is not a finite number (a whole one, on demand) within these bounds.

    Args:
        name: of the field, as the message has it.
        least, above, below: `least <= value`, `above < value`, `value < below`.

    Raises:
        UserError: names the field, what it must be, and its value.
    """
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        expected = "a whole number" if whole else "a number"
    elif isinstance(value, float) and not math.isfinite(value):
        expected = "a finite number"
    elif least is not None and value < least:
        expected = f"at least {least}"
    elif above is not None and value <= above:
        expected = f"more than {above}"
    elif below is not None and value >= below:
        expected = f"less than {below}"
    else:
        return
    raise UserError(f"{name} must be {expected}, not {value!r}")
