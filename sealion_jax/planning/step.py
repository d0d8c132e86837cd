"""A recipe's training step, compiled for devices that are not there."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.errors import JaxRuntimeError
from jax.sharding import Mesh

from sealion_jax.hardware import set_matmul_precision
from sealion_jax.model.config import Gemma3Config
from sealion_jax.objectives.preference_config import PreferenceConfig
from sealion_jax.recipe import TrainConfig
from sealion_jax.run.update import UpdateParts, jitted_update, update_parts
from sealion_jax.sharding import batch_sharding

TOKENS_A_PAIR_PLACE = 64
"""A row of preferences is taken to have a place for a pair for every so many tokens."""
SECONDS_BETWEEN_LINES = 10.0
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler says of a step; sizes in bytes a device."""

    text: str
    """Of the program; empty if it does not fit."""
    arguments: int
    outputs: int
    aliased: int
    """Outputs that take their arguments' places."""
    temporaries: int
    code: int
    seconds: float

    @property
    def needed(self) -> int:
        """All that is there while the step runs."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclass(frozen=True, kw_only=True)
class TooLarge:
    """The compiler's refusal of a step that does not fit; bytes a device."""

    needed: float
    """Of everything, or where the compiler gave up before that, of temporaries alone."""
    temporaries_alone: bool
    available: float
    largest: tuple[str, ...]
    """Its largest allocations, as it describes them."""
    seconds: float


def abstract_batch(
    config: TrainConfig, mesh: Mesh, *, pair_places: int | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """The fields of the recipe's batches: shapes, dtypes and shardings.

    Args:
        pair_places: of preferences, pairs that a row has room for. The data decides; None takes one for
            every `TOKENS_A_PAIR_PLACE` tokens.
    """
    rows, tokens = config.global_batch_size, config.sequence_length_tokens

    def field(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=batch_sharding(mesh))

    names = ("tokens", "targets", "segment_ids", "positions")
    batch = {name: field(jnp.int32, tokens) for name in names}
    batch |= {"loss_mask": field(jnp.float32, tokens), "source": field(jnp.int32)}
    if isinstance(config.objective, PreferenceConfig):
        places = pair_places or default_pair_places(config)
        for side in ("chosen", "rejected"):
            batch[f"{side}_segment"] = field(jnp.int32, places)
            if config.objective.needs_reference:
                batch[f"reference_{side}"] = field(jnp.float32, places)
    return batch


def default_pair_places(config: TrainConfig) -> int:
    """Pairs that a row is taken to have room for, where the data is not there to tell."""
    return max(1, config.sequence_length_tokens // TOKENS_A_PAIR_PLACE)


def parts_of(config: TrainConfig, model: Gemma3Config, mesh: Mesh) -> UpdateParts:
    """What the recipe's step is made of; nothing that the recipe names is opened."""
    set_matmul_precision(config.compute.dtype)
    return update_parts(config, model, mesh, num_sources=len(config.data.sources))


def compile_step(parts: UpdateParts, *, tell: Callable[[str], None]) -> Compiled | TooLarge:
    """The step that `train` would run, compiled; or by how much it is too large.

    Args:
        tell: is given a line every ten seconds while it works.
    """
    started = time.monotonic()
    with telling("tracing and compiling the step", tell):
        step = jax.ShapeDtypeStruct((), jnp.int32)
        lowered = jitted_update(parts).lower(parts.abstract, step, abstract_batch(parts.config, parts.mesh))
        try:
            compiled = lowered.compile()
        except JaxRuntimeError as error:
            if too_large := parse_refusal(str(error), seconds=time.monotonic() - started):
                return too_large
            raise
        memory = compiled.memory_analysis()
        text = compiled.as_text()
    if memory is None or text is None:
        raise RuntimeError("the compiler gives no account of the program's memory, or no text of it")
    return Compiled(
        text=text,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        seconds=time.monotonic() - started,
    )


def parse_refusal(message: str, *, seconds: float = 0.0) -> TooLarge | None:
    """What a compiler's error says of memory: needed and available bytes a device; None for another error."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    size = r"([\d.]+)([KMGT]?)i?B?"
    forms = (
        rf"Used {size} of {size} hbm",
        rf"required for [\w ]+\({size}\) exceeds available HBM \({size}\)",
    )
    for only_temporaries, form in enumerate(forms):
        if found := re.search(form, message):
            needed, unit, available, available_unit = found.groups()
            largest = re.findall(r"Size: \S+(?:\n(?!\s*Size:).*){0,8}", message)
            return TooLarge(
                needed=float(needed) * _UNITS[unit],
                temporaries_alone=bool(only_temporaries),
                available=float(available) * _UNITS[available_unit],
                largest=tuple(_one_line(allocation) for allocation in largest[:3]),
                seconds=seconds,
            )
    return None


def _one_line(allocation: str) -> str:
    """The size, shape and operator of an allocation that the compiler lists over several lines."""
    parts = [re.search(rf"{name}: (.*)", allocation) for name in ("Size", "Shape", "Operator")]
    return "; ".join(part[1].strip() for part in parts if part)


@contextmanager
def telling(what: str, tell: Callable[[str], None]) -> Iterator[None]:
    """Tells every ten seconds that some work without a measure of its own still goes on."""
    done = threading.Event()
    started = time.monotonic()

    def go_on() -> None:
        while not done.wait(SECONDS_BETWEEN_LINES):
            tell(f"{what}: {time.monotonic() - started:.0f} s")

    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
