"""How a model's arrays lie while it computes: on one device as they are, or over a mesh.

Left to itself, a partitioner leaves FSDP's weights split and moves activations. So every weight is gathered
where it is used, in the compute dtype, and its gradient reduced back to where it lies; activations are held
to their rows; attention, the lookup of embeddings and the logits run on each device's part (`shard_map`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from sealion_jax.arithmetic import EXACT, Arithmetic, to_input, to_weight
from sealion_jax.context_parallel import attend_over_context
from sealion_jax.sharding import BATCH_AXES, WEIGHT_AXES, partition_spec
from sealion_kernels import (
    AttentionMask,
    CrossEntropy,
    Split,
    Target,
    flash_attention,
    linear_cross_entropy,
    lookup,
)

GATHERED_WEIGHT = "gathered_weight"
"""Name, for a rematerialisation policy, of weights as they are used: never worth keeping."""

ATTENTION_SCOPE = "attention"
"""In the names of all that runs inside attention, by which a compiled program is read."""

SPLIT_BY_TENSOR = ("heads", "kv_heads", "mlp")


class Layout:
    """On one device: everything is where it is."""

    gathers = False
    """Whether weights are gathered where they are used."""

    def __init__(self, target: Target | None = None):
        self.target = target
        """The device that is computed on; None is JAX's first."""

    def activation(self, x: Array, axes: Sequence[str]) -> Array:
        """x, held to where it belongs.

        Args:
            axes: its dimensions' names: batch, tokens, model, heads, kv_heads, head_dim, mlp, rank, layers.
        """
        del axes
        return x

    def product(
        self, equation: str, x: Array, weight: Array, axes: Sequence[str], arithmetic: Arithmetic = EXACT
    ) -> Array:
        """The einsum of x and a weight in x's dtype; the weight's gradient is summed up in float32.

        Args:
            axes: the weight's dimensions' logical names, as in `sharding.LOGICAL_TO_MESH`.
        """
        del axes
        # One axis of tokens: XLA's CPU compiler makes a transposed copy, slowly, of what is summed over two.
        y: Any = _product(x.reshape(-1, *x.shape[2:]), weight, equation.replace("B", ""), None, arithmetic)
        return y.reshape(*x.shape[:2], *y.shape[1:])

    def embed(self, embedding: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype: Any) -> Array:
        """The rows of the tokens [B, T, D], in this dtype."""
        return lookup(embedding, tokens, dtype)

    def attention(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K H"],
        *,
        mask: AttentionMask,
        scale: float,
        implementation: Any = "auto",
    ) -> Float[Array, "B T N H"]:
        """`flash_attention` of rows to themselves."""
        return flash_attention(
            query, key, value, mask=mask, scale=scale, implementation=implementation, target=self.target
        )

    def cross_entropy(
        self,
        hidden: Float[Array, "B T D"],
        embedding: Float[Array, "V D"],
        targets: Int[Array, "B T"],
        **options: Any,
    ) -> CrossEntropy:
        """`linear_cross_entropy`, with its options."""
        return linear_cross_entropy(hidden, embedding, targets, target=self.target, **options)


class MeshLayout(Layout):
    """Over a mesh: rows over data x fsdp, tokens over context, heads and feed-forward over tensor."""

    gathers = True

    def __init__(self, mesh: Mesh):
        super().__init__(Target.of(mesh.devices.flat[0]))
        self.mesh = mesh

    def activation(self, x: Array, axes: Sequence[str]) -> Array:
        spec = PartitionSpec(
            *(
                BATCH_AXES if name == "batch" else self._axis(name, size)
                for name, size in zip(axes, x.shape, strict=True)
            )
        )
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def product(
        self, equation: str, x: Array, weight: Array, axes: Sequence[str], arithmetic: Arithmetic = EXACT
    ) -> Array:
        return _product(x, weight, equation, self._move(weight, axes), arithmetic)

    def _move(self, weight: Array, axes: Sequence[str]) -> _Move:
        """From where a weight lies to where it is used."""
        split = partition_spec(axes, weight.shape, self.mesh)
        whole = PartitionSpec(*(None if _is_weight_axis(entry) else entry for entry in split))
        return _Move(NamedSharding(self.mesh, split), NamedSharding(self.mesh, whole))

    def embed(self, embedding: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype: Any) -> Array:
        return lookup(embedding, tokens, dtype, self._split(embedding, tokens.shape[1]))

    def attention(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K H"],
        *,
        mask: AttentionMask,
        scale: float,
        implementation: Any = "auto",
    ) -> Float[Array, "B T N H"]:
        T, N, K = query.shape[1], query.shape[2], key.shape[2]
        tokens, heads, kv_heads = (self._axis(*x) for x in (("tokens", T), ("heads", N), ("kv_heads", K)))
        options = {"scale": scale, "implementation": implementation, "target": self.target}

        def local(query: Array, key: Array, value: Array, mask: AttentionMask) -> Array:
            if heads is not None and kv_heads is None:
                key, value = (_own_kv_heads(x, heads, of=N, here=query.shape[2]) for x in (key, value))
            if tokens is None:
                return flash_attention(query, key, value, mask=mask, **options)
            return attend_over_context(query, key, value, mask=mask, axis=tokens, **options)

        row = PartitionSpec(BATCH_AXES, tokens)
        keys = PartitionSpec(*row, kv_heads, None)
        queries = PartitionSpec(*row, heads, None)
        masks = jax.tree.map(lambda _: row, mask)
        with jax.named_scope(ATTENTION_SCOPE):
            return self._map(local, (queries, keys, keys, masks), queries)(query, key, value, mask)

    def cross_entropy(
        self,
        hidden: Float[Array, "B T D"],
        embedding: Float[Array, "V D"],
        targets: Int[Array, "B T"],
        **options: Any,
    ) -> CrossEntropy:
        split = self._split(embedding, hidden.shape[1])
        return linear_cross_entropy(hidden, embedding, targets, split=split, target=self.target, **options)

    def _split(self, embedding: Array, length: int) -> Split:
        """How the embedding and rows of `length` tokens lie."""
        vocab, model = partition_spec(("vocab", "embed"), embedding.shape, self.mesh)
        tokens = _axes(self._axis("tokens", length))
        return Split(mesh=self.mesh, rows=BATCH_AXES, tokens=tokens, vocab=_axes(vocab), model=_axes(model))

    def _axis(self, name: str, size: int) -> str | None:
        """The mesh axis of a dimension of an activation, not of its batch."""
        axis = "context" if name == "tokens" else "tensor" if name in SPLIT_BY_TENSOR else None
        if axis is None or self.mesh.shape[axis] == 1 or size % self.mesh.shape[axis]:
            return None
        return axis

    def _map(self, local: Any, inputs: Any, outputs: Any) -> Any:
        return jax.shard_map(local, mesh=self.mesh, in_specs=inputs, out_specs=outputs, check_vma=False)


def layout_of(mesh: Mesh) -> Layout:
    """The layout over a mesh, which may have one device."""
    return Layout(Target.of(mesh.devices.flat[0])) if mesh.size == 1 else MeshLayout(mesh)


def _is_weight_axis(entry: Any) -> bool:
    return bool(set(_axes(entry)) & set(WEIGHT_AXES))


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else entry


class _Move(NamedTuple):
    """From the sharding in which a weight lies to that in which it is used; back goes its gradient."""

    here: NamedSharding
    there: NamedSharding

    def use(self, weight: Array, dtype: Any) -> Array:
        """The weight where it is used; cast before it moves, so that fewer bytes go."""
        if self.here == self.there:
            return weight.astype(dtype)
        cast = jax.lax.with_sharding_constraint(weight.astype(dtype), self.here)
        return checkpoint_name(jax.lax.with_sharding_constraint(cast, self.there), GATHERED_WEIGHT)

    def give_back(self, d_weight: Array) -> Array:
        """The sum of all devices' gradients where the weight lies."""
        return jax.lax.with_sharding_constraint(d_weight, self.here)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _product(x: Array, weight: Array, equation: str, move: _Move | None, arithmetic: Arithmetic) -> Array:
    used = weight.astype(x.dtype) if move is None else move.use(weight, x.dtype)
    return arithmetic.forward(equation, x, used)


def _product_forward(x: Any, weight: Any, equation: str, move: _Move | None, arithmetic: Arithmetic):
    used = weight.value.astype(x.value.dtype) if move is None else move.use(weight.value, x.value.dtype)
    # Frozen weights, as under LoRA, have no gradient to compute.
    learned = jnp.zeros((0,), weight.value.dtype) if weight.perturbed else None
    return arithmetic.forward(equation, x.value, used), (x.value, used, learned)


def _product_backward(
    equation: str, move: _Move | None, arithmetic: Arithmetic, saved: tuple[Array, Array, Any], d_y: Any
):
    x, used, learned = saved
    if isinstance(d_y, SymbolicZero):
        return jnp.zeros_like(x), None
    d_x = to_input(arithmetic, equation, d_y, used)
    if learned is None:
        return d_x, None
    d_weight = to_weight(arithmetic, equation, x, d_y)
    return d_x, (d_weight if move is None else move.give_back(d_weight)).astype(learned.dtype)


_product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


def _own_kv_heads(x: Array, axis: str, *, of: int, here: int) -> Array:
    """Of all key-value heads [B, T, K, H], those that this device's `here` of `of` query heads read.

    A single key-value head cannot be split, two over four devices would need halves: each device takes the
    one head that its query heads share.
    """
    group = of // x.shape[2]
    if here % group and group % here:
        raise ValueError(
            f"{here} query heads on each device do not fit groups of {group} that share a key-value head; "
            "give mesh.tensor a size that divides one of the two"
        )
    first = jax.lax.axis_index(axis) * here // group
    return jax.lax.dynamic_slice_in_dim(x, first, max(1, here // group), axis=2)
