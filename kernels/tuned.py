"""Block sizes that were measured on a device, as `python -m sealion_kernels.tune` writes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from sealion_kernels.blocks import BlockSizes
from sealion_kernels.gpu_blocks import GpuBlockSizes
from sealion_kernels.targets import Target

TABLE = "tuned.json"


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What was the fastest for a shape on a device."""

    implementation: str
    kind: str
    """The device's, as JAX has it."""
    head_dim: int
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
    itemsize: int,
    table: Sequence[Tuned] | None = None,
) -> Tuned | None:
    """The entry for a device and shape, that of the nearest shorter length, or None.

    Args:
        table: None takes the one that is shipped.
    """
    table = shipped() if table is None else table
    wanted = (implementation, target.kind, head_dim, window, itemsize)
    fitting = [
        entry
        for entry in table
        if (entry.implementation, entry.kind, entry.head_dim, entry.window, entry.itemsize) == wanted
        and entry.length <= length
    ]
    return max(fitting, key=lambda entry: entry.length, default=None)


@cache
def shipped() -> tuple[Tuned, ...]:
    """The table in the package."""
    return from_json(files("sealion_kernels").joinpath(TABLE).read_text())


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
