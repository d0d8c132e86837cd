"""One of two processes, of four CPU devices each, that save and restore together.

    python -m tests.checkpoint.two_processes COORDINATOR PROCESS RUN_DIR

Prints a JSON object of what this process saw.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sealion_jax.checkpoint.lease import RunLease
from sealion_jax.checkpoint.locate import resolve
from sealion_jax.checkpoint.orbax import CheckpointConfig, Checkpointer
from sealion_jax.checkpoint.processes import all_lines, on_first_process
from sealion_jax.distributed import DistributedConfig, join
from sealion_jax.errors import UserError
from sealion_jax.storage import file_system

LARGE = (4, 512, 1024)


def expected(step: int) -> dict[str, np.ndarray]:
    """A stacked array large enough that replicas share the writing, and a small one."""
    rng = np.random.default_rng(step)
    return {
        "blocks": rng.normal(size=LARGE).astype(np.float32),
        "scale": rng.normal(size=(16,)).astype(np.float32),
    }


def shardings(shape: tuple[int, int]) -> dict[str, NamedSharding]:
    """Over a (data, fsdp) mesh of all devices; with two rows the data axis is the processes."""
    mesh = Mesh(np.array(jax.devices()).reshape(shape), ("data", "fsdp"))
    return {
        "blocks": NamedSharding(mesh, PartitionSpec(None, "fsdp")),
        "scale": NamedSharding(mesh, PartitionSpec()),
    }


def state(step: int) -> dict[str, jax.Array]:
    return jax.tree.map(
        lambda value, sharding: jax.make_array_from_callback(
            value.shape, sharding, lambda index: value[index]
        ),
        expected(step),
        shardings((2, 4)),
    )


def shards_are_right(tree: Any, step: int) -> bool:
    return all(
        np.array_equal(shard.data, expected(step)[name][shard.index])
        for name, leaf in tree.items()
        for shard in leaf.addressable_shards
    )


def refused(action: Any) -> str:
    try:
        on_first_process(action)
    except UserError as error:
        return str(error)
    return "not refused"


def deny() -> None:
    raise UserError("told to all")


def main() -> None:
    coordinator, process, run_dir = sys.argv[1], int(sys.argv[2]), epath.Path(sys.argv[3])
    join(DistributedConfig(coordinator_address=coordinator, num_processes=2, process_id=process))
    abstract = jax.tree.map(
        lambda value, sharding: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding),
        expected(0),
        shardings((1, 8)),
    )
    lines: list[str] = []
    seen: dict[str, Any] = {"devices": jax.device_count(), "refused": refused(deny)}
    seen["all lines"] = all_lines(["both", f"line of {process}"])
    with RunLease(run_dir) as lease:
        try:
            RunLease(run_dir).__enter__()
        except UserError as error:
            seen["second lease"] = str(error)
        with Checkpointer(run_dir, CheckpointConfig(), lease=lease, report=lines.append) as checkpointer:
            seen["new"] = checkpointer.restore_newest(abstract, abstract) is None
            for step in (1, 2):
                params, optimizer = state(step), state(step + 100)
                checkpointer.save(step, params=params, optimizer=optimizer, train={}, assets={"a": b"a"})
            checkpointer.wait()
            multihost_utils.sync_global_devices("saved")
            if process == 0:
                harm(str(run_dir / "checkpoints" / "2" / "optimizer"))
            multihost_utils.sync_global_devices("harmed")
            restored = checkpointer.restore_newest(abstract, abstract)
            assert restored is not None
            seen["step"] = restored.step
            seen["right"] = shards_are_right(restored.params, 1) and shards_are_right(restored.optimizer, 101)
            seen["source"] = str(resolve(run_dir, report=lambda line: None).path)
    seen["lines"] = lines
    try:  # a disk of each process's own; buckets are seen by all
        Checkpointer(run_dir / f"own{process}", CheckpointConfig()).restore_newest(abstract, abstract)
    except UserError as error:
        seen["not shared"] = str(error).replace(f"own{process}", "own")
    print(json.dumps(seen), flush=True)


def harm(folder: str) -> None:
    """Flips a bit in the largest file."""
    system, inner = file_system(folder)
    file = max(system.find(inner, detail=True).items(), key=lambda item: item[1]["size"])[0]
    content = bytearray(system.cat_file(file))
    content[len(content) // 2] ^= 1
    system.pipe_file(file, bytes(content))


if __name__ == "__main__":
    main()
