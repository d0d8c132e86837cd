"""What a step on preferences holds on a TPU next to one of instruction tuning; its compiler says it, no TPU.

    python benchmarks/post_training_memory.py            some 30 minutes on 2 cores
    python benchmarks/post_training_memory.py --quick    a minute: DPO alone, 6 layers, 1 chip, less optimised

Needs libtpu, which the extra `tpu` installs (a download of 213 MB). Where it is installed without a TPU, all
that uses JAX begins with some lines about that, so give it an environment of its own.

Compiles the step that `train` runs, for Gemma 3 1B as sft_1b and dpo_1b have it, with a row of 8,192 tokens
on each chip. Prints the memory of each step as the docs have it, and writes it as JSON. Fails if a step on
preferences takes more than 1.15 times the temporary memory of instruction tuning, or if there is an array of
tokens x vocabulary in a program, before it is compiled or after.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from experiments import report
from jax.sharding import Mesh

from sealion_configs import dpo_1b, sft_1b
from sealion_jax.objectives import preference_config as losses
from sealion_jax.planning.environment import prepare_environment
from sealion_jax.planning.hlo import Array
from sealion_jax.planning.step import abstract_batch
from sealion_jax.planning.topology import parse_topology, tpu_devices
from sealion_jax.recipe import TrainConfig
from sealion_jax.run.update import jitted_update, update_parts
from sealion_jax.sharding import MeshConfig, make_mesh

TOPOLOGIES = ("v5p:2x2x1", "v5p:1x1x1")
MOST_OF_SFT = 1.15
PLACES = 134
"""Pairs that a row has room for: the most that the sources of dpo_sea_small have in rows of 8,192 tokens."""
SOURCES = 10
GIB = 2**30


def on_preferences(*terms: Any) -> Callable[[], TrainConfig]:
    """The recipe dpo_1b with these losses."""
    return lambda: replace(dpo_1b.recipe(), objective=losses.PreferenceConfig(losses=terms))


STEPS: Mapping[str, Callable[[], TrainConfig]] = {
    "sft": sft_1b.recipe,
    "dpo": on_preferences(losses.SigmoidLoss()),
    "apo_zero": on_preferences(losses.APOZeroLoss()),
    "dpo + sft": on_preferences(losses.SigmoidLoss(), losses.SFTLoss()),
    "all losses": on_preferences(
        losses.SigmoidLoss(),
        losses.RobustLoss(),
        losses.IPOLoss(),
        losses.HingeLoss(),
        losses.APOZeroLoss(),
        losses.APODownLoss(),
        losses.SimPOLoss(),
        losses.OddsRatioLoss(),
        losses.SFTLoss(),
    ),
}


def main() -> None:
    """Compiles every step for every topology, and reports."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="DPO alone, 6 layers, 1 chip, optimised less")
    parser.add_argument("--output", help="folder for the table; else docs/figures, or none if quick")
    options = parser.parse_args()
    prepare_environment()
    jax.config.update("jax_platforms", "cpu")
    steps, topologies, layers = list(STEPS), TOPOLOGIES, 26
    if options.quick:
        steps, topologies, layers = ["sft", "dpo"], TOPOLOGIES[-1:], 6
        jax.config.update("jax_optimization_level", "O1")
    table, programs = [], {}
    for topology in topologies:
        mesh = make_mesh(MeshConfig(), tpu_devices(parse_topology(topology)))
        measured = {step: measure(STEPS[step](), mesh, layers=layers) for step in steps}
        sft = measured["sft"][0]["temporary"]
        for step, (memory, program) in measured.items():
            name = f"{step}, {topology}"
            table.append({"step": name, **memory, "to sft": memory["temporary"] / sft})
            programs[name] = program
    result = {
        "unit": "GiB a chip",
        "jax": jax.__version__,
        "libtpu": version("libtpu"),
        "layers": layers,
        "pairs_a_row": PLACES,
        "programs": programs,
        "table": table,
    }
    output = options.output or (None if options.quick else "docs/figures")
    report("post_training_memory", result, None if output is None else Path(output))
    assert all(row["to sft"] <= MOST_OF_SFT for row in table), "preferences take more than instruction tuning"
    assert not any(program["too_large"] for program in programs.values()), "there are tokens x vocabulary"


def measure(config: TrainConfig, mesh: Mesh, *, layers: int) -> tuple[dict[str, float], dict[str, Any]]:
    """The memory of a recipe's step in GiB a chip, and what its program has in it; a row on each chip."""
    assert config.model is not None
    config, model = replace(config, global_batch_size=mesh.size), replace(config.model, num_layers=layers)
    parts = update_parts(config, model, mesh, num_sources=SOURCES)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    started = time.perf_counter()
    lowered = jitted_update(parts).lower(
        parts.abstract, step, abstract_batch(config, mesh, pair_places=PLACES)
    )
    compiled = lowered.compile()
    seconds = round(time.perf_counter() - started)
    print(f"{config.name}: compiled in {seconds} s, chips: {mesh.size}", flush=True)
    memory = compiled.memory_analysis()
    assert memory is not None
    sizes = {
        "arguments": memory.argument_size_in_bytes / GIB,
        "outputs": memory.output_size_in_bytes / GIB,
        "temporary": memory.temp_size_in_bytes / GIB,
        "peak": memory.peak_memory_in_bytes / GIB,
    }
    arrays = compiled_arrays(compiled.as_text() or "")
    tokens, vocabulary = config.sequence_length_tokens, model.vocab_size
    too_large = [array for array in arrays if array.elements >= tokens * vocabulary]
    too_large += [
        array
        for array in lowered_arrays(lowered.as_text())
        if array.elements >= mesh.size * tokens * vocabulary
    ]
    return sizes, {
        "compile_seconds": seconds,
        "too_large": [str(array) for array in too_large],
        **largest(arrays, tokens, vocabulary),
    }


def compiled_arrays(text: str) -> set[Array]:
    """The arrays of a compiled program, each a chip's share; those inside of fusions, never stored, too."""
    found = re.findall(r"\b([a-z]+[0-9]*\w*)\[([0-9,]+)\]", text)
    return {Array(dtype, tuple(map(int, shape.split(",")))) for dtype, shape in found}


def lowered_arrays(text: str) -> set[Array]:
    """The arrays of a program before compilation, of all chips together."""
    found = re.findall(r"tensor<([0-9x]+)x(\w+)", text)
    return {Array(dtype, tuple(map(int, shape.split("x")))) for shape, dtype in found}


def largest(arrays: Iterable[Array], tokens: int, vocabulary: int) -> dict[str, str]:
    """The largest array, the largest that has tokens, and of those the largest that may be logits."""
    of_tokens = [array for array in arrays if tokens in array.shape]
    logits = [array for array in of_tokens if _may_be_logits(array, tokens, vocabulary)]
    chosen = {"largest": arrays, "largest_of_tokens": of_tokens, "largest_logits": logits}
    return {
        name: str(max(some, key=lambda array: (array.elements, array.dtype == "f32")))
        for name, some in chosen.items()
    }


def _may_be_logits(array: Array, tokens: int, vocabulary: int) -> bool:
    """Whether another dimension is the vocabulary or an even part of it, a 256th or more."""
    others = list(array.shape)
    others.remove(tokens)
    return any(size * 256 >= vocabulary and vocabulary % size == 0 for size in others)


if __name__ == "__main__":
    main()
