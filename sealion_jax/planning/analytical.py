"""What a step takes by formulas alone: for pods of GPUs, to choose what to compile, and to compare with.

Memory: the state's parts exactly; gradients in float32; of activations what `compute.remat` keeps, with the
arrays of one layer or block at work; the weights of two layers gathered; the embedding gathered, with its
gradient; logits three times what `compute.logits_bytes_per_device` allows.

Traffic: each layer's weights gathered twice a microbatch, forward and backward, in the compute dtype, and
their float32 gradients reduce-scattered once; the embedding gathered for the lookup and for the logits, and
each of these two gradients scattered; gradients' shares all-reduced over `data` once a microbatch; with
`tensor`, four all-reduces of a layer's activations, two forward and two backward, and the two forward ones
again where the backward pass computes their products again; with `context`, on global layers keys and
values passed round forward and backward, and the float32 sums of their gradients with them, beside half-
runs of everything exchanged, and on local layers the window's keys and values; again as far as it is
computed again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from sealion_jax.model.config import Gemma3Config
from sealion_jax.optimizer import adamw
from sealion_jax.planning.collectives import Kind, received_share
from sealion_jax.planning.estimate import (
    ACTIVATIONS,
    GRADIENTS,
    Estimate,
    gradient_bytes,
    split_of,
    state_bytes,
)
from sealion_jax.planning.network import Place, Seconds, Traffic, group_along, path_of, seconds
from sealion_jax.planning.step import abstract_batch
from sealion_jax.planning.topology import Topology
from sealion_jax.recipe import TrainConfig
from sealion_jax.sharding import BATCH_AXES, WEIGHT_AXES
from sealion_jax.training.state import TrainState, abstract_state

GATHERED_LAYERS = 2
LOGITS_COPIES = 3
GRADIENT_BYTES = 4
"""Of an element of a weight's gradient, as `layout` sums it up: float32."""


def analytical_state(config: TrainConfig, model: Gemma3Config, mesh: AbstractMesh) -> TrainState:
    """The training state on a mesh without devices."""
    dtype = config.compute.dtype
    on_mesh: Any = mesh  # shapes and specs are all that is asked of it
    return abstract_state(model, adamw(config.optimizer), on_mesh, lora=config.lora, frozen_dtype=dtype)


def abstract_mesh(shape: Mapping[str, int]) -> AbstractMesh:
    """A mesh of this shape, without devices."""
    return AbstractMesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def estimate_analytically(
    config: TrainConfig,
    model: Gemma3Config,
    mesh_shape: Mapping[str, int],
    topology: Topology,
    places: Sequence[Place],
    *,
    state: TrainState | None = None,
) -> Estimate:
    """By the formulas of this module.

    Args:
        state: as `analytical_state` gives it, where it is at hand: it takes longer than all the rest.
    """
    mesh: Any = abstract_mesh(mesh_shape)
    state = state or analytical_state(config, model, mesh)
    memory = {
        **state_bytes(state, abstract_batch(config, mesh)),
        GRADIENTS: gradient_bytes(state),
        ACTIVATIONS: _activation_bytes(config, model, mesh_shape),
    }
    rows = [row for row in _traffic(config, model, state, mesh_shape) if row[3]]
    traffic = _merged(
        _timed(kind, axes, mesh_shape, whole, count, topology, places) for kind, axes, whole, count in rows
    )
    return Estimate(
        method="analytical",
        memory=memory,
        available=topology.chip.hbm_bytes / topology.chip.devices,
        traffic=traffic,
        memory_traffic_bytes=_memory_traffic(config, model, state, mesh_shape),
        split=split_of(state),
    )


def tokens_on_device(config: TrainConfig, mesh_shape: Mapping[str, int]) -> float:
    """Of a microbatch."""
    rows = config.global_batch_size / config.microbatches
    parts = math.prod(mesh_shape[axis] for axis in BATCH_AXES) * mesh_shape.get("context", 1)
    return rows * config.sequence_length_tokens / parts


def _compute_bytes(config: TrainConfig) -> int:
    return jnp.dtype(config.compute.dtype).itemsize


def layer_activations(model: Gemma3Config, tensor: int) -> float:
    """Elements a token that a layer's backward pass wants, if all are kept.

    Eight of the model's dimension (two inputs, four norms' results, two products); queries, keys and values
    as projected and as rotated, and attention's result; gate, up and their product.
    """
    heads, kv_heads, H = model.num_heads, model.num_kv_heads, model.head_dim
    wide = H * (3 * heads + 4 * kv_heads) + 3 * model.feed_forward_dim
    return 8 * model.model_dim + wide / tensor


def _activation_bytes(config: TrainConfig, model: Gemma3Config, mesh_shape: Mapping[str, int]) -> float:
    tensor, size = mesh_shape["tensor"], _compute_bytes(config)
    tokens = tokens_on_device(config, mesh_shape)
    layers, a_layer, D = model.num_layers, layer_activations(model, tensor), model.model_dim
    # Queries, keys, values, gate and up; attention's result; and the two products that a layer adds.
    split = model.head_dim * (2 * model.num_heads + 2 * model.num_kv_heads) + 2 * model.feed_forward_dim
    products = 2 * D + split / tensor
    kept_by_name = sum(_named_elements(model, name, tensor) for name in config.compute.keep)
    kept, at_work = {
        "none": (layers * a_layer, 0.0),
        "dots": (layers * (products + D), a_layer),
        "layer": (layers * (D + kept_by_name), a_layer),
        "block": (
            math.ceil(layers / model.layers_per_block) * D + layers * kept_by_name,
            model.layers_per_block * a_layer,
        ),
    }[config.compute.remat]
    gathered = GATHERED_LAYERS * _layer_weights(model) / tensor * size
    embedding = model.vocab_size * model.model_dim / tensor * (size + 4)
    logits = LOGITS_COPIES * config.compute.logits_bytes_per_device
    return tokens * size * (kept + at_work) + gathered + embedding + logits


def _named_elements(model: Gemma3Config, name: str, tensor: int) -> float:
    """Of a token's tensor that can be kept by its name, on a device; what a layer adds is whole on each."""
    heads = {"query": model.num_heads, "attention": model.num_heads}
    heads |= {"key": model.num_kv_heads, "value": model.num_kv_heads}
    if name in heads:
        return heads[name] * model.head_dim / tensor
    return model.feed_forward_dim / tensor if name in ("gate", "up") else model.model_dim


def _layer_weights(model: Gemma3Config) -> float:
    D, H = model.model_dim, model.head_dim
    return D * H * (2 * model.num_heads + 2 * model.num_kv_heads) + 3 * D * model.feed_forward_dim


def _traffic(
    config: TrainConfig, model: Gemma3Config, state: TrainState, mesh_shape: Mapping[str, int]
) -> Iterator[tuple[Kind, tuple[str, ...], float, int]]:
    """(kind, axes, bytes of the whole array, executions) of a step's collectives."""
    size, tensor, batches = _compute_bytes(config), mesh_shape["tensor"], config.microbatches
    layers = model.num_layers
    weights = tuple(axis for axis in WEIGHT_AXES if mesh_shape.get(axis, 1) > 1)
    split = math.prod(mesh_shape[axis] for axis in weights)
    a_layer, embedding = _layer_weights(model) / tensor, model.vocab_size * model.model_dim / tensor
    trained = sum(leaf.size for leaf in jax.tree.leaves(state.params)) / tensor
    everything = config.lora is None
    if weights:
        yield "all-gather", weights, a_layer * size, 2 * layers * batches
        yield "all-gather", weights, embedding * size, 2 * batches
        yield (
            "reduce-scatter",
            weights,
            (a_layer if everything else trained / layers) * GRADIENT_BYTES,
            layers * batches,
        )
        yield "reduce-scatter", weights, embedding * GRADIENT_BYTES, 2 * batches if everything else 0
    if mesh_shape["data"] > 1:
        yield "all-reduce", ("data",), trained / split * GRADIENT_BYTES, batches
    tokens = tokens_on_device(config, mesh_shape)
    if tensor > 1:
        times = 4 + _reduced_again(config)
        yield "all-reduce", ("tensor",), tokens * model.model_dim * size, times * layers * batches
    if mesh_shape.get("context", 1) > 1:
        for sent, times in _over_context(config, model, tokens, mesh_shape):
            yield "collective-permute", ("context",), sent, times * batches


def _over_context(
    config: TrainConfig, model: Gemma3Config, tokens: float, mesh_shape: Mapping[str, int]
) -> Iterator[tuple[float, int]]:
    """(bytes that a device sends, how often in a microbatch) of attention over devices with a run each."""
    ring, size = mesh_shape["context"], _compute_bytes(config)
    a_head = model.head_dim / mesh_shape["tensor"] * size
    queries, keys = tokens * model.num_heads * a_head, tokens * 2 * model.num_kv_heads * a_head
    again = config.compute.remat in ("layer", "block")
    kept = "attention" in (*config.compute.keep, *config.compute.offload)
    global_layers = sum(map(model.is_global, range(model.num_layers)))
    # Keys and values go round forward and backward, and the sums of their gradients with them, and home.
    yield keys, (2 + (again and not kept)) * (ring - 1) * global_layers
    yield keys / size * GRADIENT_BYTES, ring * global_layers
    # Queries, keys and values in half-runs, and the result back; of two devices' half-runs one of two stays.
    moved = 0.5 if ring == 2 else 1.0
    yield moved * (2 * queries + keys), (2 + again) * global_layers
    run = config.sequence_length_tokens / ring
    before = min(model.sliding_window_tokens - 1, (ring - 1) * run)
    yield before / run * keys, (2 + again) * (model.num_layers - global_layers)


def _reduced_again(config: TrainConfig) -> int:
    """Of a layer's products that are summed up over `tensor`, how many the backward pass computes again."""
    if config.compute.remat not in ("layer", "block"):
        return 0
    return len({"output", "down"} - {*config.compute.keep, *config.compute.offload})


def _timed(
    kind: Kind,
    axes: tuple[str, ...],
    mesh_shape: Mapping[str, int],
    whole: float,
    count: int,
    topology: Topology,
    places: Sequence[Place],
) -> Traffic:
    group = group_along(axes, mesh_shape)
    once = seconds(kind, whole, path_of(group, places, topology), topology)
    return Traffic(
        kind=kind,
        axes=axes,
        group_size=len(group),
        count=count,
        received_bytes=count * received_share(kind, len(group)) * whole,
        seconds=Seconds(count * once.links, count * once.network),
    )


def _merged(rows: Iterable[Traffic]) -> tuple[Traffic, ...]:
    """One row for each kind and axes, the one that takes longest first."""
    merged: dict[tuple[Kind, tuple[str, ...]], Traffic] = {}
    for row in rows:
        before = merged.get((row.kind, row.axes))
        merged[row.kind, row.axes] = row if before is None else _sum(before, row)
    return tuple(sorted(merged.values(), key=lambda row: -sum(row.seconds)))


def _sum(one: Traffic, other: Traffic) -> Traffic:
    return dataclasses.replace(
        one,
        count=one.count + other.count,
        received_bytes=one.received_bytes + other.received_bytes,
        seconds=Seconds(*(a + b for a, b in zip(one.seconds, other.seconds, strict=True))),
    )


def _memory_traffic(
    config: TrainConfig, model: Gemma3Config, state: TrainState, mesh_shape: Mapping[str, int]
) -> float:
    """Weights read three times a microbatch; activations written once and read twice, as are logits; and the
    optimizer's reading and writing: weights, gradients and both moments."""
    size, tensor = _compute_bytes(config), mesh_shape["tensor"]
    tokens = tokens_on_device(config, mesh_shape)
    weights = 3 * model.num_layers * _layer_weights(model) / tensor * size
    activations = 3 * tokens * model.num_layers * layer_activations(model, tensor) * size
    logits = 3 * tokens * model.vocab_size / tensor * 4
    update = 7 * gradient_bytes(state)
    return config.microbatches * (weights + activations + logits) + update
