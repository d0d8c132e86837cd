"""The training steps of 4B and 27B, compiled for TPU pods that are not there: memory, traffic, kernels.

    pip install -e '.[tpu]'                      in an environment of its own
    python benchmarks/tpu_steps.py               six pods, some three minutes each on 2 cores
    python benchmarks/tpu_steps.py --quick       27B on v5p:4x4x4 alone

For each the recipe's step as `train` runs it, with the recipe's sets of compiler flags. Prints and writes,
of a chip: what it needs of its memory; the bytes that collectives bring it in a step; those over `fsdp`,
and how many times the least of FSDP they are (each layer's weights gathered twice in bfloat16 and its
gradient scattered once in float32, the tied embedding gathered and its gradient scattered once, in every
microbatch; `tensor` splits them all); how many attention kernels are in the program. Fails if a step does
not fit; if it moves less than 0.98 or more than 1.1 times that least; if anything of two megabytes or more
that moves over `fsdp` or `data` has not the size of a weight or has tokens in its shape, or moves inside
attention, over whatever axis; or if there are more logits anywhere than the recipe allows at a time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sealion_jax.planning.environment import prepare_environment

GIB = 2**30
OF_BOUND = (0.98, 1.1)
"""What moves may be so many times the least: less, and something was not seen."""
LARGE_BYTES = 2 * 2**20
PADDING = 1.25
"""Compilers round the parts of an array up."""
BF16, F32 = 2, 4
COLUMNS = (
    "temporary, GiB",
    "moved, GB",
    "over fsdp, GB",
    "to the least",
    "attention kernels",
    "compile seconds",
)
"""Of a step that fits."""


@dataclass(frozen=True, kw_only=True)
class Pod:
    """A recipe on a pod."""

    recipe: str
    topology: str
    rows_per_device: int
    """Rows at a time of a chip, or of the chips that share them."""
    tensor: int = 1
    """Devices that share each row; `fsdp` takes the rest, or what the recipe says where this is 1."""
    data: int = 1
    """Copies of the weights, beside `tensor`: a width that splits into few rows a chip is rounded up."""

    @property
    def name(self) -> str:
        """As the table has it."""
        rows = f"{self.rows_per_device} row" + ("s" if self.rows_per_device > 1 else "")
        axes = {"data": self.data, "tensor": self.tensor}
        over = [f"{name} {size}" for name, size in axes.items() if size > 1]
        return ", ".join([self.recipe, self.topology, rows, *over])


PODS = (
    Pod(recipe="cpt_27b", topology="v5p:4x4x4", rows_per_device=4),
    Pod(recipe="cpt_27b", topology="v6e:16x16", rows_per_device=1, data=2, tensor=2),
    Pod(recipe="cpt_27b", topology="v5e:16x16", rows_per_device=1, tensor=4),
    Pod(recipe="cpt_4b", topology="v5p:2x2x2", rows_per_device=4),
    Pod(recipe="cpt_4b", topology="v6e:8x8", rows_per_device=2),
    Pod(recipe="cpt_4b", topology="v5e:8x8", rows_per_device=1, tensor=4),
)


def main() -> None:
    """Compiles every step, checks it, and reports."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the first pod alone")
    parser.add_argument(
        "--output", type=Path, help="folder for the JSON, whose good rows are not compiled again"
    )
    options = parser.parse_args()
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
    prepare_environment()

    import jax
    from experiments import report

    from sealion_jax.compiler import CompilerConfig, set_flags

    jax.config.update("jax_platforms", "cpu")
    set_flags(CompilerConfig(), os.environ)  # as the recipes have it; TPU's compiler is not loaded yet
    versions = {"jax": jax.__version__, "libtpu": version("libtpu")}
    done = good_rows(options.output, versions)
    table, wrong = [], []
    for pod in PODS[:1] if options.quick else PODS:
        row, faults = (done[pod.name], []) if pod.name in done else measure(pod)
        table.append(row)
        wrong += [f"{pod.name}: {fault}" for fault in faults]
        report("tpu_steps", versions | {"faults": wrong, "table": table}, options.output)
    assert not wrong, "; ".join(wrong)


def good_rows(folder: Path | None, versions: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """By pod, the rows that are in the folder's JSON, of the same compiler and without a fault."""
    path = None if folder is None else folder / "tpu_steps.json"
    if path is None or not path.exists():
        return {}
    found = json.loads(path.read_text())
    if any(found[name] != number for name, number in versions.items()):
        return {}
    rows = {row["step"]: row for row in found["table"]}
    return {name: row for name, row in rows.items() if not any(name in fault for fault in found["faults"])}


def measure(pod: Pod) -> tuple[dict[str, Any], list[str]]:
    """A pod's row of the table, and what is wrong with its step."""
    from sealion_jax.layout import ATTENTION_SCOPE
    from sealion_jax.planning.collectives import collectives
    from sealion_jax.planning.planner import model_of, tpu_mesh
    from sealion_jax.planning.step import Compiled, compile_step, parts_of
    from sealion_jax.planning.topology import parse_topology
    from sealion_jax.recipe import load_recipe
    from sealion_jax.run.update import on_mesh
    from sealion_jax.sharding import MeshConfig

    config = replace(load_recipe(pod.recipe), rows_per_device=pod.rows_per_device)
    # As many tokens' logits at a time, whatever part of the vocabulary a device has.
    logits_bytes = config.compute.logits_bytes_per_device // pod.tensor
    config = replace(config, compute=replace(config.compute, logits_bytes_per_device=logits_bytes))
    if pod.tensor > 1:
        config = replace(config, mesh=MeshConfig(data=pod.data, fsdp=-1, tensor=pod.tensor))
    model = model_of(config)
    topology = parse_topology(pod.topology)
    mesh = tpu_mesh(config, topology)
    config = on_mesh(config, mesh)
    started = time.perf_counter()
    step = compile_step(parts_of(config, model, mesh), tell=lambda line: print(line, flush=True))
    row: dict[str, Any] = {"step": pod.name}
    if not isinstance(step, Compiled):
        row |= {"needed, GiB": step.needed / GIB} | dict.fromkeys(COLUMNS)
        return row, [f"does not fit: {step.needed / GIB:.1f} of {step.available / GIB:.1f} GiB"]
    moved = collectives(step.text, dict(mesh.shape))
    weights = [one for one in moved if "fsdp" in one.axes and "tensor" not in one.axes]
    tensor = mesh.shape["tensor"]
    rows = config.global_batch_size * tensor // mesh.size // config.microbatches
    tokens = {config.sequence_length_tokens, rows * config.sequence_length_tokens}
    least = fsdp_bytes(model, mesh.shape["fsdp"], tensor) * config.microbatches
    row |= {
        "needed, GiB": step.needed / GIB,
        "temporary, GiB": step.temporaries / GIB,
        "moved, GB": sum(one.step_bytes for one in moved) / 1e9,
        "over fsdp, GB": sum(one.step_bytes for one in weights) / 1e9,
        "to the least": sum(one.step_bytes for one in weights) / least,
        "attention kernels": step.text.count('custom_call_target="tpu_custom_call"'),
        "compile seconds": time.perf_counter() - started,
    }
    wrong = faults(
        step.text,
        moved,
        model=model,
        mesh_shape=dict(mesh.shape),
        tokens=tokens,
        logits_bytes=config.compute.logits_bytes_per_device,
        scope=ATTENTION_SCOPE,
    )
    if not row["attention kernels"]:
        wrong.append("no attention kernel is in it")
    if not OF_BOUND[0] < row["to the least"] < OF_BOUND[1]:
        wrong.append(f"moves {row['to the least']:.3f} times what FSDP needs")
    return row, wrong


def fsdp_bytes(model: Any, groups: int, tensor: int = 1) -> float:
    """The least that a device has to receive in a microbatch: of weights that are split over so many groups.

    Args:
        tensor: devices of a group, each of which has its part of every weight.
    """
    *layer, table = weight_sizes(model)
    layers = model.num_layers * sum(layer)
    moved = BF16 * (2 * layers + table) + F32 * (layers + table)
    return moved / tensor * (groups - 1) / groups


def weight_sizes(model: Any) -> list[int]:
    """Elements of each matrix of a layer, and of the embedding."""
    D, N, K, H = model.model_dim, model.num_heads, model.num_kv_heads, model.head_dim
    attention = [D * N * H] * 2 + [D * K * H] * 2
    return [*attention, *[D * model.feed_forward_dim] * 3, model.vocab_size * D]


def faults(
    text: str,
    moved: list[Any],
    *,
    model: Any,
    mesh_shape: Mapping[str, int],
    tokens: set[int],
    logits_bytes: int,
    scope: str,
) -> list[str]:
    """What a step must not have, and has.

    Args:
        text: of the compiled program.
        moved: its collectives.
        tokens: sizes that only activations have.
        logits_bytes: most of float32 logits that may be alive at a time.
        scope: in the names of all that runs inside attention.
    """
    found = []
    tensor, fsdp = mesh_shape.get("tensor", 1), mesh_shape["fsdp"]
    whole = {size // parts for size in weight_sizes(model) for parts in (1, tensor)}
    parts = {size // fsdp for size in whole}
    largest_part = PADDING * max(weight_sizes(model)[:-1]) / fsdp / tensor
    for one in moved:
        large = [array for array in one.arrays if array.num_bytes >= LARGE_BYTES]
        if not large:
            continue
        what = f"{one.kind} of {', '.join(map(str, large))} over {' x '.join(one.axes)} ({one.op_name})"
        if scope in one.op_name:
            found.append(f"{what}: inside attention")
        if "tensor" in one.axes:
            continue
        gathered = "fsdp" in one.axes
        if one.kind == "collective-permute" and all(array.elements <= largest_part for array in large):
            continue  # parts that were rounded up are cut anew
        if any(tokens & set(array.shape) for array in large):
            found.append(f"{what}: the shape of an activation")
        elif not all(_is_about(array.elements, whole if gathered else parts) for array in large):
            found.append(f"{what}: no weight's size")
        elif gathered and one.kind == "all-reduce":
            found.append(f"{what}: to every device, where a part would do")
    for shape in set(re.findall(r"\[([0-9,]+)\]", text)):
        sizes = [int(size) for size in shape.split(",")]
        for columns in {model.vocab_size, model.vocab_size // tensor} & set(sizes):
            rows = math.prod(sizes) // columns
            is_table = _is_about(rows, {model.model_dim, model.model_dim // fsdp})
            if rows * columns * F32 > 1.05 * logits_bytes and not is_table:
                found.append(f"an array of tokens x vocabulary: {shape}")
    return sorted(set(found))


def _is_about(size: int, sizes: set[int]) -> bool:
    """Whether it is one of these, or one rounded up."""
    return any(one <= size <= PADDING * one for one in sizes)


if __name__ == "__main__":
    main()
