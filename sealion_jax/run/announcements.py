"""What a run says before it trains, and what to do with it afterwards."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Sequence

import jax
from etils import epath

from sealion_jax import storage
from sealion_jax.data.plan import examples_table, format_examples, format_plan, left_out_rows, plan_table
from sealion_jax.recipe import TrainConfig
from sealion_jax.run.parts import Parts
from sealion_jax.sharding import batch_devices

LEFT_OUT_FILE = "left_out.jsonl"


def opening(parts: Parts, run_dir: epath.Path) -> Iterator[str]:
    """What will be trained, on what, from what; what is left out is listed in the run directory."""
    config = parts.config
    devices = jax.devices()
    shape = " x ".join(f"{axis} {size}" for axis, size in parts.mesh.shape.items())
    trained, count = (
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
        for tree in (parts.abstract.params, parts.abstract.weights)
    )
    tokens = config.global_batch_size * config.sequence_length_tokens
    yield (
        f"{config.name}: {count:,} parameters on {len(devices)} {devices[0].device_kind} ({shape}), "
        f"{config.steps} steps of {tokens:,} tokens; run directory {run_dir}"
    )
    if config.lora is not None:
        yield f"{trained:,} of {count:,} parameters are trained: {config.lora.describe()}"
    yield format_plan(plan_table(parts.mixture, steps=config.steps))
    if examples := examples_table(parts.mixture):
        yield format_examples(examples)
        yield from _listed(parts, run_dir)


def adapted(config: TrainConfig, parts: Parts) -> Iterator[str]:
    """That the batch is computed in another number of parts than the recipe says, if it is."""
    found, devices = parts.config.microbatches, batch_devices(parts.mesh)
    rows = config.global_batch_size // devices
    if found != config.microbatches:
        yield (
            f"{found} microbatches here, and not {config.microbatches}: each of the {devices} data x fsdp "
            f"devices has {rows} of {config.global_batch_size} rows, and computes {rows // found} at a time"
        )


def _listed(parts: Parts, run_dir: epath.Path) -> Iterator[str]:
    """Writes `<run>/left_out.jsonl`, if there are chats or pairs that are in no row, and says so."""
    if jax.process_index() != 0:
        return
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in left_out_rows(parts.mixture)]
    place = run_dir / LEFT_OUT_FILE
    place.unlink(missing_ok=True)  # of a run that was begun here before with other data
    if lines:
        storage.write_whole(place, "".join(lines).encode())
        yield f"those left out are listed in {place}"


def next_commands(
    config: TrainConfig,
    run_dir: epath.Path,
    *,
    talks: bool = False,
    reference: str | None = None,
    pairs: Sequence[str] = (),
) -> list[str]:
    """What to do with a run that is done: measure it as it was measured in training, and export it.

    Args:
        talks: whether it has learned to answer, so that one can talk to it.
        reference: the CHECKPOINT that its preferences were measured against.
        pairs: names of the held-out sets of pairs, which alone are measured against one.
    """
    commands = [["generate", str(run_dir)]] if talks else []
    if config.evaluation.sets:
        sets = config.evaluation.sets
        file = sets[pairs[0]] if pairs and reference is not None else next(iter(sets.values()))
        words = ["evaluate", str(run_dir), "--data", file]
        words += ["--context-tokens", str(config.sequence_length_tokens)]
        # The options' own defaults are left out.
        if config.evaluation.max_documents is not None:
            words += ["--max-documents", str(config.evaluation.max_documents)]
        if config.compute.dtype != "float32":
            words += ["--dtype", config.compute.dtype]
        if pairs and reference is not None:
            words += ["--reference", reference]
        commands.append([*words, "--output", "scores.json"])
    commands.append(["convert", "to-hf", str(run_dir), str(run_dir / "hf")])
    return [shlex.join(["python", "-m", f"sealion_jax.{name}", *rest]) for name, *rest in commands]
