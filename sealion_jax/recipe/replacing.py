"""Values of a configuration's tree replaced by their paths."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from sealion_jax.errors import UserError

Path = tuple[str, ...]
"""Fields, keys of mappings and numbers of entries, from the root."""


def replaced(
    value: Any, changes: Mapping[Path, Any], *, replace: Callable[..., Any] = dataclasses.replace
) -> Any:
    """The tree with the values at these paths replaced; a dataclass is checked once, with all its changes.

    Args:
        replace: makes a dataclass with other values of some fields.

    Raises:
        UserError: a change lies below another one that leaves nothing there.
    """
    if () in changes:
        value = changes[()]
    by_step: dict[str, dict[Path, Any]] = {}
    for path, new in changes.items():
        if path:
            by_step.setdefault(path[0], {})[path[1:]] = new
    if not by_step:
        return value
    if value is None:
        raise UserError(f"{next(iter(by_step))} is set in a group that is set to none; choose one of the two")
    below = partial(replaced, replace=replace)
    if isinstance(value, Mapping):
        return {**value, **{step: below(value.get(step), inner) for step, inner in by_step.items()}}
    if isinstance(value, tuple):
        if gone := [step for step in by_step if int(step) >= len(value)]:
            raise UserError(
                f"entry {gone[0]} of a list is set, and the list is emptied; choose one of the two"
            )
        return tuple(below(inner, by_step.get(str(k), {})) for k, inner in enumerate(value))
    return replace(value, **{step: below(getattr(value, step), inner) for step, inner in by_step.items()})


def replace_unchecked(value: Any, **fields: Any) -> Any:
    """`dataclasses.replace` without the checks of `__post_init__`."""
    other = copy.copy(value)
    for name, new in fields.items():
        object.__setattr__(other, name, new)
    return other
