"""Single arrays of a checkpoint: their shapes, any slice of one, and writing them one part at a time.

What is on disk is what Orbax's PyTree handler reads and writes: Zarr arrays inside one OCDBT key-value store
a tree (`params/`), with the tree's structure in `params/_METADATA`. OCDBT packs all chunks of a tree into a
few large files. Without it every chunk is a file of its own, with its own fsync: tens of thousands of objects
for a large sharded model, and hundreds for a tiny one that takes a blink to train. Nothing is compressed:
weights hardly shrink, and sizes stay predictable.

Stacked arrays (`blocks/...`, leading axis = block) have chunks of one block, so that a layer is read alone.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from etils import epath

from sealion_jax.checkpoint.files import is_there, remove_tree
from sealion_jax.checkpoint.space import no_room_error
from sealion_jax.errors import UserError

Index = tuple[slice | int, ...]

CHUNK_BYTES = 32 * 2**20
"""Chunks are at most this large: a process that restores a shard reads whole chunks around it."""
DATA_FILE_BYTES = 256 * 2**20
"""Size at which OCDBT begins a new file, and so the unit of parallel hashing and of buffering."""
STACKED = "blocks"
"""First key of the leaves whose leading axis is the block."""

_IN_FLIGHT_BYTES = 64 * 2**20
_METADATA = "_METADATA"
# As Orbax writes it: small values (array headers) inside the index, one manifest file, one index node.
_OCDBT_CONFIG = {
    "max_inline_value_bytes": 1024,
    "max_decoded_node_bytes": 100_000_000,
    "manifest_kind": "single",
}
_DICT_KEY = 2  # Orbax's number for a dict key in `key_metadata`


@dataclass(frozen=True)
class Leaf:
    """One array to write, in parts.

    `name` is the path with slashes ("blocks/layer_0/mlp/gate"). Every part is (index, array): the array is
    what `leaf[index]` becomes, in the leaf's dtype. The parts must cover the leaf once. Parts of whole blocks
    (index `(b,)`) or of whole chunks (see `chunk_shape`) are fastest; chunks that parts share are merged.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype | type
    parts: Iterable[tuple[Index, np.ndarray]]


def chunk_shape(name: str, shape: tuple[int, ...], dtype: Any) -> tuple[int, ...]:
    """Shape of the chunks in which `name` is written: one block of a stacked leaf, halved until it fits."""
    chunk = [max(1, size) for size in shape]
    if name.partition("/")[0] == STACKED and chunk:
        chunk[0] = 1
    while math.prod(chunk) * np.dtype(dtype).itemsize > CHUNK_BYTES:
        largest = chunk.index(max(chunk))
        chunk[largest] = -(-chunk[largest] // 2)
    return tuple(chunk)


def leaf_shapes(step_dir: epath.PathLike, *, tree: str = "params") -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every array in a step's directory, by name ("blocks/layer_0/mlp/gate").

    `tree` is "params" or "optimizer". Raises UserError if there is no such tree in `step_dir`.
    """
    directory = epath.Path(step_dir) / tree
    context = ts.Context()
    opening = {name: _open(directory, name, context=context) for name in _leaf_names(directory)}
    stores = {name: store.result() for name, store in opening.items()}
    return {
        name: jax.ShapeDtypeStruct(store.shape, store.dtype.numpy_dtype) for name, store in stores.items()
    }


def read_leaf(
    step_dir: epath.PathLike, name: str, index: Index | None = None, *, tree: str = "params"
) -> np.ndarray:
    """The array `name` of a step's directory, or `array[index]` of it; only the chunks needed are read.

    `index` holds ints and slices of step 1, with NumPy's meaning, for the leading axes. Raises UserError if
    there is no such array.
    """
    directory = epath.Path(step_dir) / tree
    names = _leaf_names(directory)
    if name not in names:
        nearest = difflib.get_close_matches(name, names, 1)
        raise UserError(
            f"{directory} has no array {name!r}"
            + (f"; the nearest name is {nearest[0]!r}" if nearest else "")
        )
    store = _open(directory, name).result()
    return np.asarray(store[_absolute(index or (), store.shape, name)].read().result())


def write_leaves(step_dir: epath.PathLike, leaves: Iterable[Leaf]) -> None:
    """Writes `step_dir`/params, which must not exist, as Orbax would.

    Leaves and their parts are taken one at a time. In memory are one part and some hundreds of megabytes of
    others on their way to the disk. The step's directory is complete only when its digests are written; if
    anything fails, params/ is removed. Raises UserError if the disk is full, and ValueError if a leaf's parts
    do not fit it or do not cover it.
    """
    directory = epath.Path(step_dir) / "params"
    if is_there(directory):
        raise UserError(f"{directory} exists already; choose another directory or remove it")
    directory.mkdir(parents=True)
    context = ts.Context()
    names: list[str] = []
    try:
        pending = _Pending()
        for leaf in leaves:
            _check_name(leaf.name, names)
            names.append(leaf.name)
            store = _create(directory, leaf, context=context)
            for index, part in _checked_parts(leaf):
                pending.add(store, index, part)
        pending.wait()
        (directory / _METADATA).write_text(json.dumps(_tree_metadata(names)))
    except BaseException as error:
        remove_tree(directory)
        full = no_room_error(error, directory, doing="writing a checkpoint")
        if full:
            raise full from error
        raise


class _Pending:
    """Writes under way, committed together: each commit of OCDBT writes its index anew, and a chunk that
    several parts share is written once."""

    def __init__(self) -> None:
        self._transaction, self._bytes = ts.Transaction(), 0

    def add(self, store: Any, index: Index, part: np.ndarray) -> None:
        store.with_transaction(self._transaction)[index].write(part).result()
        self._bytes += part.nbytes
        if self._bytes >= _IN_FLIGHT_BYTES:
            self.wait()

    def wait(self) -> None:
        self._transaction.commit_sync()
        self._transaction, self._bytes = ts.Transaction(), 0


def _checked_parts(leaf: Leaf) -> Iterator[tuple[Index, np.ndarray]]:
    """The leaf's parts with absolute indices; raises ValueError for a wrong shape, dtype or coverage."""
    covered = 0
    for index, part in leaf.parts:
        absolute = _absolute(index, leaf.shape, leaf.name)
        expected = tuple(i.stop - i.start for i in absolute if isinstance(i, slice))
        if part.shape != expected or part.dtype != np.dtype(leaf.dtype):
            raise ValueError(
                f"{leaf.name}: the part at {index} must be {np.dtype(leaf.dtype)}{list(expected)}, "
                f"not {part.dtype}{list(part.shape)}"
            )
        covered += part.size
        yield absolute, part
    if covered != math.prod(leaf.shape):
        raise ValueError(
            f"{leaf.name}: the parts have {covered} elements, the array of shape {list(leaf.shape)} has "
            f"{math.prod(leaf.shape)}"
        )


def _absolute(index: Index, shape: tuple[int, ...], name: str) -> Index:
    """`index` for every axis, without negative numbers or open ends; raises ValueError if it does not fit."""
    if len(index) > len(shape):
        raise ValueError(f"{name}: {len(index)} indices for an array of {len(shape)} axes")
    result: list[slice | int] = []
    for i, size in zip(index, shape, strict=False):
        if isinstance(i, slice):
            start, stop, step = i.indices(size)
            if step != 1:
                raise ValueError(f"{name}: slices must have step 1, not {step}")
            result.append(slice(start, max(start, stop)))
        else:
            if not -size <= i < size:
                raise ValueError(f"{name}: index {i} is outside an axis of {size}")
            result.append(int(i) % size)
    return (*result, *(slice(0, size) for size in shape[len(index) :]))


def _check_name(name: str, written: list[str]) -> None:
    keys = name.split("/")
    if name in written or not all(keys) or any("." in key for key in keys):
        raise ValueError(f"leaf names must be unique, without dots or empty parts: {name!r}")


def _leaf_names(directory: epath.Path) -> list[str]:
    """Names of a tree's arrays, in the order they were written."""
    try:
        metadata = json.loads((directory / _METADATA).read_text())
    except FileNotFoundError:
        raise UserError(f"{directory} is not part of a checkpoint: it has no {_METADATA} file") from None
    return [
        "/".join(str(key["key"]) for key in entry["key_metadata"])
        for entry in metadata["tree_metadata"].values()
        if not entry["value_metadata"].get("skip_deserialize")
    ]


def _tree_metadata(names: list[str]) -> dict[str, Any]:
    """What Orbax writes to `_METADATA` for a nested dict of arrays."""
    return {
        "tree_metadata": {
            str(tuple(name.split("/"))): {
                "key_metadata": [{"key": key, "key_type": _DICT_KEY} for key in name.split("/")],
                "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False},
            }
            for name in names
        },
        "use_ocdbt": True,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def _kvstore(directory: epath.Path, name: str) -> dict[str, Any]:
    """TensorStore's description of where the array `name` of a tree lives."""
    text = str(directory)
    if text.startswith("gs://"):
        bucket, _, path = text.removeprefix("gs://").partition("/")
        base = {"driver": "gcs", "bucket": bucket, "path": f"{path}/"}
    else:
        base = {"driver": "file", "path": f"{directory.resolve()}/"}
    return {"driver": "ocdbt", "base": base, "path": name.replace("/", ".") + "/"}


def _open(directory: epath.Path, name: str, *, context: ts.Context | None = None) -> Any:
    """A future of the stored array `name`."""
    spec = {"driver": "zarr", "kvstore": _kvstore(directory, name), "fill_missing_data_reads": False}
    return ts.open(spec, read=True, open=True, context=context)


def _create(directory: epath.Path, leaf: Leaf, *, context: ts.Context) -> Any:
    """A new, empty stored array for `leaf`."""
    kvstore = {
        **_kvstore(directory, leaf.name),
        "config": _OCDBT_CONFIG,
        "target_data_file_size": DATA_FILE_BYTES,
    }
    spec = {
        "driver": "zarr",
        "kvstore": kvstore,
        "dtype": np.dtype(leaf.dtype).name,
        "metadata": {
            "shape": list(leaf.shape),
            "chunks": list(chunk_shape(leaf.name, leaf.shape, leaf.dtype)),
            "compressor": None,
        },
        "store_data_equal_to_fill_value": True,
    }
    return ts.open(spec, create=True, context=context).result()
