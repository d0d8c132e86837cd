"""Gemma 3's language model as a Flax NNX module, and the functions between it and its parameter tree.

Outside this package parameters are a plain nested dict of arrays. A jitted step goes

    bind = binder(config, compute=compute)                     # once
    model = bind(params)                                       # inside the step, no copy
    hidden = model(tokens, positions=positions, segment_ids=segment_ids)
    log_probs = model.cross_entropy(hidden, targets).log_probs
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sealion_jax.layout import Layout
from sealion_jax.model import remat
from sealion_jax.model.config import ComputeConfig, Gemma3Config
from sealion_jax.model.layers import (
    Attend,
    Block,
    Context,
    Layer,
    RMSNorm,
    attend_in_rows,
)
from sealion_jax.model.lora import LoraConfig
from sealion_jax.model.parameters import Initializer
from sealion_jax.shapes import Hidden, TokenIds
from sealion_kernels import CrossEntropy

Params = dict[str, Any]
"""Nested dict of arrays, such as {"embedder": {"embedding": [V, D]}, "blocks": {"layer_0": ...}, ...}."""

Memory = dict[str, list[Any]]
"""What an `Attend` keeps of each layer of "blocks" (stacked, a leading axis of blocks) and of "rest"."""


class Embedder(nnx.Module):
    """Token embeddings, tied: rows times sqrt(D) going in, logits coming out."""

    def __init__(self, config: Gemma3Config, *, init: Initializer):
        shape = (config.vocab_size, config.model_dim)
        self.embedding = init.matrix(shape, ("vocab", "embed"), fan_in=config.model_dim)

    def __call__(self, tokens: TokenIds, *, dtype: jax.typing.DTypeLike, layout: Layout) -> Hidden:
        """Embeddings [B, T, D] in the compute dtype; the factor sqrt(D) is rounded to it first."""
        factor = jnp.asarray(self.embedding.shape[1] ** 0.5, dtype)
        return layout.embed(self.embedding[...], tokens, dtype) * factor


class Gemma3(nnx.Module):
    """A Gemma 3 text model: tokens in, hidden states after the final norm out.

    Whole blocks of the layer pattern are stacked and scanned over, so compile time does not grow with depth;
    the layers left over follow as a shorter block.
    """

    def __init__(
        self,
        config: Gemma3Config,
        *,
        compute: ComputeConfig | None = None,
        layout: Layout | None = None,
        lora: LoraConfig | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.compute = compute or ComputeConfig()
        self.layout = layout or Layout()
        init = Initializer(rngs=rngs, dtype=param_dtype)
        self.embedder = Embedder(config, init=init)
        if config.num_blocks:
            stacked = Initializer(rngs=rngs, dtype=param_dtype, stack=config.num_blocks)
            self.blocks = Block(config, num_layers=config.layers_per_block, init=stacked, lora=lora)
        if config.num_rest_layers:
            self.rest = Block(config, num_layers=config.num_rest_layers, init=init, lora=lora)
        self.final_norm = RMSNorm(config.model_dim, "norm", epsilon=config.norm_epsilon, init=init)

    def __call__(self, tokens: TokenIds, *, positions: TokenIds, segment_ids: TokenIds) -> Hidden:
        """Hidden states [B, T, D] in the compute dtype.

        Args:
            tokens: ids in [0, V).
            positions: from 0 in each segment; what RoPE turns by.
            segment_ids: attention stays inside a segment; segments are contiguous, 0 is padding.
        """
        return self.remember(tokens, positions=positions, segment_ids=segment_ids, attend=attend_in_rows)[0]

    def remember(
        self,
        tokens: TokenIds,
        *,
        positions: TokenIds,
        segment_ids: TokenIds,
        attend: Attend,
        memory: Memory | None = None,
    ) -> tuple[Hidden, Memory]:
        """Hidden states, and what `attend` keeps of every layer, given what was kept of it before."""
        context = Context.make(
            self.config,
            positions=positions,
            segment_ids=segment_ids,
            compute=self.compute,
            layout=self.layout,
            attend=attend,
        )
        memory, kept = memory or {}, {}
        x = self.embedder(tokens, dtype=self.compute.dtype, layout=self.layout)
        x = self.layout.activation(x, ("batch", "tokens", "model"))
        if self.config.num_blocks:
            x, kept["blocks"] = _scan(self.blocks, x, context, self.compute, memory.get("blocks"))
        if self.config.num_rest_layers:
            x, kept["rest"] = _apply(self.rest, x, context, self.compute, memory.get("rest"), in_scan=False)
        return self.final_norm(x), kept

    @property
    def embedding(self) -> Float[Array, "V D"]:
        return self.embedder.embedding[...]

    def cross_entropy(self, hidden: Hidden, targets: TokenIds, **options: Any) -> CrossEntropy:
        """Log-probabilities of the targets, in chunks; the options are those of `linear_cross_entropy`."""
        chunk_bytes = self.compute.logits_bytes_per_device
        return self.layout.cross_entropy(hidden, self.embedding, targets, chunk_bytes=chunk_bytes, **options)

    def logits(self, hidden: Hidden) -> Float[Array, "B T V"]:
        """All logits, float32; for tests and small uses: 8,192 tokens of them are 8.6 GB."""
        return jnp.einsum(
            "BTD,VD->BTV", hidden, self.embedding.astype(hidden.dtype), preferred_element_type=jnp.float32
        )


def _scan(
    blocks: Block, x: Hidden, context: Context, compute: ComputeConfig, memory: list[Any] | None
) -> tuple[Hidden, list[Any]]:
    """x after every block of the stack, and what each layer keeps, stacked.

    Whatever wraps a layer is split, scanned and merged with it.
    """
    graph, stacked = nnx.split(blocks)
    in_scan = jax.tree.leaves(stacked)[0].shape[0] > 1  # one turn is no loop: XLA unrolls it

    def body(x: Hidden, block: tuple[nnx.State, list[Any] | None]) -> tuple[Hidden, list[Any]]:
        params, memory = block
        return _apply(nnx.merge(graph, params), x, context, compute, memory, in_scan=in_scan)

    return jax.lax.scan(body, x, (stacked, memory))


def _apply(
    block: Block,
    x: Hidden,
    context: Context,
    compute: ComputeConfig,
    memory: list[Any] | None,
    *,
    in_scan: bool,
) -> tuple[Hidden, list[Any]]:
    """x after each layer of a block, and what each layer keeps."""

    def run(layers: list[Layer], x: Hidden, memory: list[Any]) -> tuple[Hidden, list[Any]]:
        kept = []
        for layer, remembered in zip(layers, memory, strict=True):
            x, new = layer(x, context, remembered)
            kept.append(new)
        return x, kept

    layers = block.layers()
    memory = memory or [None] * len(layers)
    if compute.remat == "none" and not context.layout.gathers:
        return run(layers, x, memory)  # `jax.checkpoint` would round what it keeps, which XLA does not fuse
    size = len(layers) if compute.remat == "block" else 1
    policy = remat.policy(compute)
    kept = []
    for first in range(0, len(layers), size):
        part = slice(first, first + size)
        # The two passes of a scan are loops apart; elsewhere XLA could merge computing again with computing.
        step = jax.checkpoint(partial(run, layers[part]), policy=policy, prevent_cse=not in_scan)
        x, new = step(x, memory[part])
        kept += new
    return x, kept


def _abstract(config: Gemma3Config, **options: Any) -> Gemma3:
    """The module with shapes for parameters."""
    return nnx.eval_shape(lambda: Gemma3(config, rngs=nnx.Rngs(0), **options))


def binder(
    config: Gemma3Config,
    *,
    compute: ComputeConfig | None = None,
    layout: Layout | None = None,
    lora: LoraConfig | None = None,
) -> Callable[[Params], Gemma3]:
    """A function from a parameter tree to the module that holds it, without a copy; for use inside `jit`.

    Args:
        layout: how arrays lie over a mesh; None is one device.
        lora: the adapters that are in the tree (see `lora.joined`); None where it has none.
    """
    graph = nnx.graphdef(_abstract(config, compute=compute, layout=layout, lora=lora))

    def bind(params: Params) -> Gemma3:
        return nnx.merge(graph, params)

    return bind


def init_params(
    key: jax.Array,
    config: Gemma3Config,
    *,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    lora: LoraConfig | None = None,
) -> Params:
    """Random parameters to train from scratch; under `jit` with out_shardings each device draws its shard.

    Norms start at 0 (a factor of 1), matrices normal with variance 1 / fan-in, the embedding with 1 / D: so
    embedded tokens and first logits have unit variance.
    """
    model = Gemma3(config, lora=lora, param_dtype=param_dtype, rngs=nnx.Rngs(params=key))
    return nnx.to_pure_dict(nnx.state(model))


def abstract_params(
    config: Gemma3Config,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    *,
    lora: LoraConfig | None = None,
) -> Params:
    """The parameter tree with jax.ShapeDtypeStruct for arrays."""
    return nnx.to_pure_dict(nnx.state(_abstract(config, param_dtype=param_dtype, lora=lora)))


def with_matrices_in(abstract: Params, dtype: jax.typing.DTypeLike) -> Params:
    """The abstract tree with its matrices in another dtype, and its norms, taken in float32, as they are."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            leaf
            if path[-1].key == "scale"
            else jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
        ),
        abstract,
    )


def parameter_axes(config: Gemma3Config, *, lora: LoraConfig | None = None) -> Params:
    """The parameter tree with each array's logical axis names, such as ("layers", "embed", "mlp")."""
    state = nnx.state(_abstract(config, lora=lora))
    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
    axes = jax.tree.map(lambda leaf: leaf.get_metadata("axes"), state, is_leaf=is_variable)
    return nnx.to_pure_dict(axes)
