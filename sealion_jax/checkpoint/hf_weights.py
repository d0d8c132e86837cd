"""The language model's weights in a Hugging Face directory, read as leaves of our parameter tree.

Only the bytes that are asked for are read, so a process that holds a shard of each array never has more than
that in memory, and nothing needs converting before training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from etils import epath

from sealion_jax.checkpoint.hf_config import CONFIG_FILE, is_tied, parse_hf_config, parse_json_object
from sealion_jax.checkpoint.hf_names import (
    CARRIED_PREFIXES,
    HEADS,
    LeafTensors,
    contiguous,
    find_prefix,
    name_table,
)
from sealion_jax.checkpoint.safetensors_stream import NUMPY_DTYPES, SafetensorsFolder, listed
from sealion_jax.errors import UserError
from sealion_jax.model.config import Gemma3Config

Index = tuple[slice | int, ...]

_COMPARED_BYTES = 32 * 2**20


@dataclass(frozen=True, kw_only=True)
class HfWeights:
    """An opened directory, every name, shape and dtype of which has been checked."""

    config: Gemma3Config
    folder: SafetensorsFolder
    prefix: str
    """Of the language model's tensors."""
    head: str | None
    """The tensor that repeats the embedding, if there is one."""
    table: dict[str, LeafTensors]
    """By our leaf's name."""
    carried: tuple[str, ...]
    """Tensors that are not the language model's, in the files' order."""

    @classmethod
    def open(cls, directory: epath.PathLike) -> HfWeights:
        """Reads config.json and the headers of all files.

        Raises:
            UserError: something is missing, unknown, of the wrong shape, or damaged; lists names.
        """
        directory = epath.Path(directory)
        if not (directory / CONFIG_FILE).exists():
            raise UserError(f"{directory} has no {CONFIG_FILE}; expected a Hugging Face directory")
        raw = parse_json_object((directory / CONFIG_FILE).read_bytes(), str(directory / CONFIG_FILE))
        config = parse_hf_config(raw, str(directory / CONFIG_FILE))
        folder = SafetensorsFolder.open(directory)
        prefix = find_prefix(folder.tensors, str(directory))
        table = name_table(config, prefix)
        head = next((name for name in HEADS if name in folder.tensors), None)
        carried = tuple(name for name in folder.tensors if name.startswith(CARRIED_PREFIXES))
        _check_tensors(folder, table, others={head, *carried})
        _check_head(folder, table[0], head, tied=is_tied(raw, str(directory / CONFIG_FILE)))
        return cls(
            config=config,
            folder=folder,
            prefix=prefix,
            head=head,
            table={entry.leaf: entry for entry in table},
            carried=carried,
        )

    @property
    def tensor_names(self) -> list[str]:
        """The language model's tensors, the head left out."""
        return [name for entry in self.table.values() for name in entry.names]

    @property
    def main_dtype(self) -> str:
        """Of the embedding, in safetensors' words; in nearly every checkpoint that of all."""
        return self.folder.tensors[self.tensor_names[0]].dtype

    @property
    def num_bytes(self) -> int:
        """Of the tensors that are converted or carried."""
        return sum(self.folder.tensors[name].nbytes for name in [*self.tensor_names, *self.carried])

    @property
    def num_params(self) -> int:
        """Elements of all tensors, the head left out."""
        tensors = (self.folder.tensors[name] for name in [*self.tensor_names, *self.carried])
        return sum(math.prod(tensor.shape) for tensor in tensors)

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of each of our leaves."""
        return {
            leaf: jax.ShapeDtypeStruct(entry.shape, self.dtype(leaf)) for leaf, entry in self.table.items()
        }

    def dtype(self, leaf: str) -> np.dtype:
        """The leaf's dtype: that of its tensors, float32 if some of them are."""
        names = self.table[leaf].names
        return max(
            (NUMPY_DTYPES[self.folder.tensors[name].dtype] for name in names), key=lambda d: d.itemsize
        )

    def read(self, leaf: str, index: Index = (), *, dtype: Any = None) -> np.ndarray:
        """`leaf[index]` in our layout; only its own bytes are read.

        `index` holds ints and slices of step 1 for the leading axes. The dtype is the leaf's own, or `dtype`.
        """
        entry = self.table[leaf]
        dtype = np.dtype(dtype or self.dtype(leaf))
        slices, kept = _as_slices(index, entry.shape)
        if not entry.is_stacked:
            return self._one(entry, entry.names[0], slices).astype(dtype, copy=False)[kept]
        names = entry.names[slices[0]]
        if len(names) == 1:
            return self._one(entry, names[0], slices[1:]).astype(dtype, copy=False)[None][kept]
        out = np.empty((len(names), *(s.stop - s.start for s in slices[1:])), dtype)
        for k, name in enumerate(names):
            out[k] = self._one(entry, name, slices[1:])
        return out[kept]

    def _one(self, entry: LeafTensors, name: str, slices: Sequence[slice]) -> np.ndarray:
        """Part of one tensor in our layout; `slices` are of our axes."""
        layout, sizes = entry.layout, entry.sizes
        wanted = dict(zip(layout.ours, slices, strict=True))
        first, *merged = layout.groups[0]
        rows_each = math.prod(sizes[letter] for letter in merged)
        rows = self.folder.rows(name, wanted[first].start * rows_each, wanted[first].stop * rows_each)
        apart = rows.reshape(-1, *(sizes[letter] for letter in layout.theirs[1:]))
        part = apart[(slice(None), *(wanted[letter] for letter in layout.theirs[1:]))]
        return contiguous(layout.to_ours(part))


def load_hf_params(directory: epath.PathLike, abstract: Any) -> Any:
    """The parameters of a Hugging Face directory on the devices that `abstract` names, in its dtypes.

    Args:
        abstract: nested dict of ShapeDtypeStruct; one without a sharding goes to the first device.

    Raises:
        UserError: the directory is damaged, or is not the model that `abstract` describes.
    """
    weights = HfWeights.open(directory)
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    wanted = {"/".join(str(entry.key) for entry in path): leaf for path, leaf in leaves}
    _check_same_model(weights, {name: leaf.shape for name, leaf in wanted.items()})
    somewhere = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def load(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.make_array_from_callback(
            leaf.shape, leaf.sharding or somewhere, _remember_last(weights, name, leaf.dtype)
        )

    loaded = [load(name, leaf) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(abstract), loaded)


def _remember_last(weights: HfWeights, name: str, dtype: Any) -> Callable[[Any], np.ndarray]:
    """A reader of shards; several devices may hold the same one, and ask for it one after the other."""
    last: list[tuple[Index, np.ndarray]] = []

    def read(index: Index) -> np.ndarray:
        if not last or last[0][0] != index:
            last[:] = [(index, weights.read(name, index, dtype=dtype))]
        return last[0][1]

    return read


def _as_slices(index: Index, shape: tuple[int, ...]) -> tuple[list[slice], tuple[Any, ...]]:
    """Closed slices for every axis, and the index that afterwards drops the axes that were ints."""
    full = (*index, *(slice(None) for _ in shape[len(index) :]))
    slices, kept = [], []
    for entry, size in zip(full, shape, strict=True):
        if isinstance(entry, slice):
            start, stop, _ = entry.indices(size)
            slices.append(slice(start, max(start, stop)))
            kept.append(slice(None))
        else:
            slices.append(slice(entry, entry + 1))
            kept.append(0)
    return slices, tuple(kept)


def _check_tensors(
    folder: SafetensorsFolder, table: Sequence[LeafTensors], *, others: set[str | None]
) -> None:
    """Raises UserError unless the directory has exactly the tensors of the model, with their shapes."""
    expected = {name: entry for entry in table for name in entry.names}
    found = folder.tensors
    problems = []
    if missing := [name for name in expected if name not in found]:
        problems.append(f"{len(missing)} tensors are missing: {listed(missing)}")
    if unknown := [name for name in found if name not in expected and name not in others]:
        problems.append(f"{len(unknown)} tensors are not known: {listed(unknown)}")
    if wrong := [
        f"{name} is {list(found[name].shape)} instead of {list(entry.their_shape)}"
        for name, entry in expected.items()
        if name in found and found[name].shape != entry.their_shape
    ]:
        problems.append(f"shapes that {CONFIG_FILE} contradicts: {listed(wrong)}")
    if other := sorted({found[name].dtype for name in expected if name in found} - set(NUMPY_DTYPES)):
        names = [name for name in expected if name in found and found[name].dtype in other]
        why = " (float16 overflows in Gemma 3)" if "F16" in other else ""
        problems.append(
            f"dtype {', '.join(other)}{why}, where bfloat16 or float32 is expected: {listed(names)}"
        )
    if problems:
        raise UserError(
            f"{folder.directory} is not a checkpoint of Gemma 3 as its {CONFIG_FILE} says: "
            + "; ".join(problems)
        )


def _check_head(folder: SafetensorsFolder, embedding: LeafTensors, head: str | None, *, tied: bool) -> None:
    """Raises UserError unless the output matrix is the embedding."""
    name = embedding.names[0]
    if head is None:
        if not tied:
            raise UserError(
                f"{folder.directory}: {CONFIG_FILE} has tie_word_embeddings = false, but there is no "
                f"{HEADS[0]}; Gemma 3's output matrix is its embedding"
            )
        return
    ours, theirs = folder.tensors[name], folder.tensors[head]
    if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype) or not _same_rows(folder, name, head):
        raise UserError(
            f"{folder.directory}: {head} is not equal to {name}; Gemma 3's output matrix is its embedding, "
            "and a separate one is not supported"
        )


def _same_rows(folder: SafetensorsFolder, one: str, other: str) -> bool:
    tensor = folder.tensors[one]
    step = max(1, _COMPARED_BYTES * tensor.shape[0] // tensor.nbytes)
    starts: Iterable[int] = range(0, tensor.shape[0], step)
    bits = f"u{NUMPY_DTYPES[tensor.dtype].itemsize}"
    return all(
        np.array_equal(
            folder.rows(one, start, min(start + step, tensor.shape[0])).view(bits),
            folder.rows(other, start, min(start + step, tensor.shape[0])).view(bits),
        )
        for start in starts
    )


def _check_same_model(weights: HfWeights, wanted: dict[str, tuple[int, ...]]) -> None:
    """Raises UserError where the leaves wanted are not those that the directory has."""
    have = {leaf: entry.shape for leaf, entry in weights.table.items()}
    different = [
        f"{name} is {have.get(name, 'absent')} there, {wanted.get(name, 'absent')} here"
        for name in dict.fromkeys([*wanted, *have])
        if have.get(name) != wanted.get(name)
    ]
    if different:
        raise UserError(
            f"{weights.folder.directory} is another model than the recipe's: {listed(different)}; take its "
            "shapes (no model in the recipe) or another checkpoint"
        )
