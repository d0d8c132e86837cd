"""Block sizes that were measured on a device, as `python -m sealion_kernels.tune` writes them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from sealion_kernels.blocks import BlockSizes
from sealion_kernels.gpu_blocks import GpuBlockSizes
from sealion_kernels.targets import Target

TABLE = "tuned.json"

USERS = "SEALION_KERNELS_TUNED"
"""The variable of the environment that names another table, whose entries come before the shipped ones."""


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What was the fastest for a shape on a device."""

    implementation: str
    kind: str
    """The device's, as JAX has it."""
    head_dim: int
    group: int
    """Query heads for each key-value head, which a TPU's kernels hold together."""
    window: int | None
    """None on a global layer."""
    length: int
    itemsize: int
    """Bytes of an element of the inputs."""
    forward: BlockSizes
    backward: BlockSizes
    backward_queries: BlockSizes | None = None


def best(
    implementation: str,
    target: Target,
    *,
    length: int,
    window: int | None,
    head_dim: int,
    group: int,
    itemsize: int,
    table: Sequence[Tuned] | None = None,
) -> Tuned | None:
    """The entry for a device and shape, that of the nearest shorter length, or None.

    Args:
        table: None takes the user's and the shipped one; of two entries for one shape the first counts.
    """
    table = (*users(), *shipped()) if table is None else table
    wanted = (implementation, target.kind, head_dim, group, window, itemsize)

    def of(entry: Tuned) -> tuple[Any, ...]:
        shape = entry.head_dim, entry.group, entry.window, entry.itemsize
        return entry.implementation, entry.kind, *shape

    fitting = [entry for entry in table if of(entry) == wanted and entry.length <= length]
    return max(fitting, key=lambda entry: entry.length, default=None)


@cache
def shipped() -> tuple[Tuned, ...]:
    """The table in the package."""
    return from_json(files("sealion_kernels").joinpath(TABLE).read_text())


@cache
def users() -> tuple[Tuned, ...]:
    """The table in the file that the environment names, if it names one; read once.

    Raises:
        ValueError: there is no such file, or it holds no table.
    """
    path = os.environ.get(USERS)
    if not path:
        return ()
    try:
        return from_json(Path(path).read_text())
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{USERS} names {path}, which is no table of block sizes ({error}); name one that "
            "`python -m sealion_kernels.tune --output` wrote, or unset it"
        ) from error


def to_json(table: Sequence[Tuned]) -> str:
    """The table, an entry a line."""
    lines = ",\n".join(json.dumps(asdict(entry)) for entry in table)
    return f"[\n{lines}\n]\n"


def from_json(text: str) -> tuple[Tuned, ...]:
    """The table that `to_json` gave the text for."""
    return tuple(_entry(plain) for plain in json.loads(text))


def _entry(plain: dict[str, Any]) -> Tuned:
    sizes = {
        name: None if plain[name] is None else _sizes(plain[name])
        for name in ("forward", "backward", "backward_queries")
    }
    return Tuned(**{**plain, **sizes})


def _sizes(plain: dict[str, int]) -> BlockSizes:
    return GpuBlockSizes(**plain) if "num_warps" in plain else BlockSizes(**plain)
