"""A program that saves checkpoints in children which it kills, and tells what each next child finds.

    python -m tests.checkpoint.killed_saves RUN_DIR SEED NUM_RANDOM_KILLS

Children are forked before JAX has started, so that each costs a fraction of a second. Prints a line of
JSON for each kill.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sealion_jax.checkpoint import layout, sealing
from sealion_jax.checkpoint import orbax as ours
from sealion_jax.checkpoint.layout import StepDirectories
from sealion_jax.checkpoint.lease import RunLease
from sealion_jax.checkpoint.orbax import CheckpointConfig, Checkpointer

MOMENTS: dict[str, tuple[Any, str, str]] = {
    "the mark is set": (StepDirectories, "begin", "after"),
    "arrays are committed": (ours, "write_assets", "before"),
    "assets are written": (ours, "write_assets", "after"),
    "digests are written": (sealing, "write_manifest", "after"),
    "the mark is gone": (StepDirectories, "finish", "after"),
    "an old step lost its digests": (layout, "remove_tree", "before"),
}
"""Moments of a save at which a child kills itself: (where, function, before or after it)."""


def expected(step: int) -> dict[str, np.ndarray]:
    """The state after `step` steps."""
    grid = np.arange(2**18, dtype=np.float32).reshape(4, -1)
    return {"blocks": grid + np.float32(step), "scale": np.full(16, step, np.float32)}


def main() -> None:
    run_dir, seed, num_kills = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    draw = random.Random(seed)
    plans: list[tuple[str | None, float]] = [(moment, 60.0) for moment in MOMENTS]
    plans += [(None, draw.uniform(0.0, 0.7)) for _ in range(num_kills)]
    draw.shuffle(plans)
    for moment, delay in plans:
        print(json.dumps(_round(run_dir, moment, delay)), flush=True)
    print(json.dumps(_round(run_dir, None, 0.0)), flush=True)


def _round(run_dir: str, moment: str | None, delay: float) -> dict[str, Any]:
    """Runs one child, which dies at `moment` or is killed `delay` seconds after it has restored."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            _save_on_and_on(run_dir, lambda line: os.write(writer, f"{line}\n".encode()), moment)
        except BaseException as error:
            os.write(writer, f"error {type(error).__name__}: {error}\n".encode())
        os._exit(1)
    os.close(writer)
    text, deadline = b"", time.monotonic() + 60
    while select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
        block = os.read(reader, 4096)
        if not block:
            break  # the child is dead
        if b"restored" in block:
            deadline = time.monotonic() + delay
        text += block
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    while block := os.read(reader, 4096):  # said between our last look and its death
        text += block
    os.close(reader)
    lines = [line.partition(" ") for line in text.decode().splitlines()]
    numbers = {
        word: [int(rest) for head, _, rest in lines if head == word] for word in ("restored", "complete")
    }
    directories = StepDirectories(run_dir)
    found = directories.root.iterdir() if directories.root.exists() else ()
    return {
        "moment": moment,
        "restored": numbers["restored"],
        "complete": max([*numbers["restored"], *numbers["complete"]], default=0),
        "errors": [rest for head, _, rest in lines if head == "error"],
        "left_over": sorted({path.name for path in found} - set(map(str, directories.complete()))),
    }


def _save_on_and_on(run_dir: str, tell: Callable[[str], object], moment: str | None) -> None:
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), expected(0))
    config = CheckpointConfig(keep_last=2)
    with RunLease(run_dir) as lease, Checkpointer(run_dir, config, lease=lease) as checkpointer:
        restored = checkpointer.restore_newest(abstract, abstract)
        step = restored.step if restored else 0
        if restored:
            for tree in (restored.params, restored.optimizer):
                jax.tree.map(np.testing.assert_array_equal, tree, expected(step))
            assert restored.train == {"counter": 7 * step, "step": step}
        tell(f"restored {step}")
        if moment:
            _die_at(*MOMENTS[moment])
        while True:
            step += 1
            state = jax.tree.map(jax.numpy.asarray, expected(step))
            checkpointer.save(
                step, params=state, optimizer=state, train={"counter": 7 * step}, assets={"model.json": b"{}"}
            )
            if checkpointer.newest:
                tell(f"complete {checkpointer.newest}")


def _die_at(where: Any, name: str, when: str) -> None:
    """Makes this process kill itself before or after the third call of a function."""
    function, calls = getattr(where, name), [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if when == "before" and calls[0] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if when == "after" and calls[0] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(where, name, wrapped)


if __name__ == "__main__":
    main()
