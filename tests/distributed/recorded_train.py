"""The train command, with a record of every row that lies on this process's devices:

    python -m tests.distributed.recorded_train RECORD.jsonl [what train takes]

The record has a line for each step: {"step", "rows": {row of the global batch: hash of all its arrays}}.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from sealion_jax import cli, train
from sealion_jax.data.batches import GlobalBatches
from sealion_jax.run import stretch


def rows_on_devices(batch: Mapping[str, jax.Array]) -> dict[int, str]:
    """Row -> hash of what of it lies on this process's devices; one that lies there twice must be alike."""
    found: dict[int, dict[str, bytes]] = {}
    for name, array in sorted(batch.items()):
        for shard in array.addressable_shards:
            first = shard.index[0].start or 0
            for offset, row in enumerate(np.asarray(shard.data)):
                content = f"{name} {row.dtype} {row.shape}".encode() + row.tobytes()
                assert found.setdefault(first + offset, {}).setdefault(name, content) == content
    return {row: hashlib.sha256(b"".join(parts.values())).hexdigest() for row, parts in found.items()}


def main(argv: Sequence[str]) -> None:
    """Trains, and records."""
    steps = itertools.count()
    true_iterate, true_to_device = GlobalBatches.iterate, stretch.to_device

    def iterate(self, start_step, *arguments, **more):
        nonlocal steps
        steps = itertools.count(start_step)
        return true_iterate(self, start_step, *arguments, **more)

    def to_device(*arguments, **more):
        batch = true_to_device(*arguments, **more)
        file.write(json.dumps({"step": next(steps), "rows": rows_on_devices(batch)}) + "\n")
        file.flush()
        return batch

    GlobalBatches.iterate, stretch.to_device = iterate, to_device
    with Path(argv[0]).open("w") as file:
        train.main(argv[1:])


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
