"""A small training state like the real one, on any mesh of the eight CPU devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MESHES = {
    "fsdp 8": (1, 8, 1),
    "fsdp 4 x tensor 2": (1, 4, 2),
    "data 2 x fsdp 4": (2, 4, 1),
    "one device": (1, 1, 1),
}


def make_mesh(name: str) -> Mesh:
    shape = MESHES[name]
    return Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), ("data", "fsdp", "tensor"))


def _shapes() -> dict[str, Any]:
    """Shapes and dtypes of a parameter tree: two blocks, a rest, an embedding; one leaf in bfloat16."""
    f32, bf16 = jnp.float32, jnp.bfloat16
    return {
        "embedder": {"embedding": ((64, 16), f32)},
        "blocks": {
            "layer_0": {
                "mlp": {"gate": ((3, 16, 32), f32), "down": ((3, 32, 16), bf16)},
                "pre_mlp_norm": {"scale": ((3, 16), f32)},
            }
        },
        "rest": {"layer_0": {"mlp": {"gate": ((16, 32), f32)}}},
        "final_norm": {"scale": ((16,), f32)},
    }


def transform() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1.0, 0.5, 9)))


def _sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """The last two axes over fsdp and tensor; vectors and numbers on every device."""
    if len(shape) < 2 or shape[-2] % 8:
        return NamedSharding(mesh, PartitionSpec())
    return NamedSharding(mesh, PartitionSpec(*[None] * (len(shape) - 2), "fsdp", "tensor"))


def make_state(mesh_name: str, *, seed: int) -> tuple[Any, Any]:
    """(params, optimizer state) on a mesh, of random bits (NaNs among them)."""
    mesh, rng = make_mesh(mesh_name), np.random.default_rng(seed)

    def draw(leaf: Any) -> jax.Array:
        raw = rng.integers(0, 256, int(np.prod(leaf.shape)) * leaf.dtype.itemsize, dtype=np.uint8)
        return jax.device_put(raw.view(leaf.dtype).reshape(leaf.shape), _sharding(mesh, leaf.shape))

    params, optimizer = abstract_state()
    return jax.tree.map(draw, params), jax.tree.map(draw, optimizer)


def abstract_state(mesh_name: str | None = None) -> tuple[Any, Any]:
    """(params, optimizer state) as ShapeDtypeStructs, with the shardings of a mesh if one is named."""
    is_spec = lambda x: isinstance(x, tuple)  # noqa: E731
    params = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(*spec), _shapes(), is_leaf=is_spec)
    both = (params, jax.eval_shape(transform().init, params))
    if mesh_name is None:
        return both
    mesh = make_mesh(mesh_name)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_sharding(mesh, leaf.shape)), both
    )


def _bits(array: Any) -> np.ndarray:
    return np.atleast_1d(np.ascontiguousarray(np.asarray(array))).view(np.uint8)


def assert_same_bits(ours: Any, theirs: Any) -> None:
    """Asserts that two trees have the same structure, shapes, dtypes and bits."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_array_equal(_bits(a), _bits(b))
