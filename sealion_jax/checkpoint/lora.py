"""Steps that hold adapters alone: what they stand on, and reading them merged with it.

<step>/params/             the adapters
       assets/lora.json    their configuration, where their base is, and its fingerprint
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from etils import epath

from sealion_jax.checkpoint.arrays import STACKED, Index, leaf_shapes, read_leaf
from sealion_jax.config_tree import from_plain, to_plain
from sealion_jax.errors import UserError
from sealion_jax.model.lora import INPUT_AXES, LORA, LoraConfig

LORA_FILE = "lora.json"

Read = Callable[[str, Index], np.ndarray]
"""A leaf's name and an index (ints and slices of step 1, for the leading axes) -> that part of it."""


@dataclass(frozen=True, kw_only=True)
class LoraRecord:
    """What a step with adapters says of them."""

    lora: LoraConfig
    base: str
    """Absolute path of what they stand on: a step's directory or a Hugging Face directory."""
    fingerprint: str
    """Of its weights."""

    @classmethod
    def from_json(cls, content: bytes) -> LoraRecord:
        try:
            return from_plain(json.loads(content), cls, path=LORA_FILE)
        except json.JSONDecodeError as error:
            raise UserError(f"{LORA_FILE} is not JSON: {error}") from error

    def to_json(self) -> bytes:
        return (json.dumps(to_plain(self, LoraRecord), indent=1) + "\n").encode()


def merged_reader(read_base: Read, step_dir: epath.PathLike, lora: LoraConfig) -> Read:
    """A reader of the base's leaves with the step's adapters added: those that have one come in float32.

    In memory are the part that is asked for, its share of a and b, and their product.
    """
    adapters = leaf_shapes(step_dir)

    def read(leaf: str, index: Index = ()) -> np.ndarray:
        part = read_base(leaf, index)
        module, _, target = leaf.rpartition("/")
        adapter = f"{module}/{LORA}/{target}"
        if f"{adapter}/a" not in adapters:
            return part
        of_a, of_b = _adapter_indices(leaf, index)
        a, b = read_leaf(step_dir, f"{adapter}/a", of_a), read_leaf(step_dir, f"{adapter}/b", of_b)
        blocks = a.shape[0] if leaf.startswith(f"{STACKED}/") and not _is_one(index) else 1
        change = a.reshape(blocks, -1, lora.rank) @ b.reshape(blocks, lora.rank, -1)
        change *= np.float32(lora.scale)
        change = change.reshape(part.shape)
        change += part.astype(np.float32, copy=False)
        return change

    return read


def _adapter_indices(leaf: str, index: Index) -> tuple[Index, Index]:
    """Which parts of a [blocks, *in, W] and b [blocks, W, *out] make up a part of w [blocks, *in, *out]."""
    target: Any = leaf.rpartition("/")[2]
    inputs = INPUT_AXES[target]
    stacked = 1 if leaf.startswith(f"{STACKED}/") else 0
    first = index[:stacked] or (slice(None),) * stacked
    return (*first, *index[stacked : stacked + inputs]), (*first, slice(None), *index[stacked + inputs :])


def _is_one(index: Index) -> bool:
    """Whether the first axis is indexed by a number, and so is gone."""
    return bool(index) and not isinstance(index[0], slice)


def load_leaves(read: Read, abstract: Any) -> Any:
    """The parameters that `read` gives, as `abstract` wants them: ShapeDtypeStructs, with shardings or not.

    Every process reads what its devices hold, one shard of one array at a time.
    """
    somewhere = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def load(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = "/".join(str(entry.key) for entry in path)
        last: list[tuple[Index, np.ndarray]] = []  # several devices may hold the same shard

        def shard(index: Any) -> np.ndarray:
            if not last or last[0][0] != index:
                last[:] = [(index, read(name, index).astype(leaf.dtype, copy=False))]
            return last[0][1]

        return jax.make_array_from_callback(leaf.shape, leaf.sharding or somewhere, shard)

    return jax.tree_util.tree_map_with_path(load, abstract)
