"""A checkpoint of any kind as an export sees it: what is read, and what its tensors and files are called."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from etils import epath

from sealion_jax.checkpoint.hf_assets import (
    CHAT_TEMPLATE_FILE,
    SOURCE,
    TENSORS_FILE,
    UNTOUCHED_FILE,
    TensorRecord,
    source_files,
    stored_tensors,
)
from sealion_jax.checkpoint.hf_import import row_parts
from sealion_jax.checkpoint.hf_names import LeafTensors, name_table
from sealion_jax.checkpoint.hf_tokenizer import MODEL_FILE
from sealion_jax.checkpoint.hf_weights import Index
from sealion_jax.checkpoint.layout import asset_paths
from sealion_jax.checkpoint.lora import Read
from sealion_jax.checkpoint.safetensors_stream import NUMPY_DTYPES, SafetensorsFolder, listed, read_header
from sealion_jax.checkpoint.safetensors_write import NewTensor
from sealion_jax.checkpoint.weights import Weights
from sealion_jax.errors import UserError
from sealion_jax.model.config import Gemma3Config

TEXT_PREFIX = "model."
"""Of the tensors of a model that never had other names."""
STORED_NAMES = {dtype.name: name for name, dtype in NUMPY_DTYPES.items()}
"""Our name of a dtype -> that of safetensors."""


@dataclass(frozen=True, kw_only=True)
class Exportable:
    """A whole model; adapters are merged with what they stand on while they are read."""

    path: epath.Path
    config: Gemma3Config
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    """Of each leaf, as it is stored; of adapters, as their base is."""
    read: Read
    tokenizer: bytes | None
    chat_template: bytes | None
    """The one it was tuned with; what came from a source is among the files."""
    files: Mapping[str, epath.Path]
    """What came from a Hugging Face source, by its name there."""
    record: TensorRecord | None
    """How that source named its tensors."""
    untouched: Sequence[NewTensor]

    @classmethod
    def of(cls, weights: Weights) -> Exportable:
        """What `open_weights` gave; raises UserError if it is not whole."""
        if weights.source.kind == "hf":
            files, assets = source_files(weights.path), {}
            record, tokenizer = TensorRecord.of(weights.hf), files.get(MODEL_FILE)
        else:
            assets = asset_paths(weights.path)
            files = {
                name.removeprefix(SOURCE): path for name, path in assets.items() if name.startswith(SOURCE)
            }
            files.pop(UNTOUCHED_FILE, None)
            recorded, tokenizer = files.pop(TENSORS_FILE, None), assets.get(MODEL_FILE)
            record = None if recorded is None else TensorRecord.from_json(recorded.read_bytes())
        template = assets.get(CHAT_TEMPLATE_FILE)
        return cls(
            path=weights.path,
            config=weights.config,
            shapes=weights.shapes(),
            read=weights.reader(),
            tokenizer=None if tokenizer is None else tokenizer.read_bytes(),
            chat_template=None if template is None else template.read_bytes(),
            files=files,
            record=record,
            untouched=_untouched(weights),
        )

    @property
    def num_params(self) -> int:
        """Elements of all tensors, the head left out."""
        return sum(math.prod(tensor.shape) for tensor in (*self.shapes.values(), *self.untouched))

    def tensors(self, dtype: str | None) -> list[NewTensor]:
        """Everything to be written, in order, each read when it is written."""
        table = name_table(self.config, self.record.prefix if self.record else TEXT_PREFIX)
        check_leaves(table, self.shapes, self.path)
        tensors = [self._tensor(entry, k, dtype) for entry in table for k in range(len(entry.names))]
        head = self.record.head if self.record else None
        repeated = [self._tensor(table[0], 0, dtype, name=head)] if head else []
        return [*sorted(tensors, key=by_layer), *repeated, *self.untouched]

    def _tensor(self, entry: LeafTensors, k: int, dtype: str | None, *, name: str | None = None) -> NewTensor:
        name = name or entry.names[k]
        own = np.dtype(self.shapes[entry.leaf].dtype)
        stored = STORED_NAMES[dtype] if dtype else self._stored_dtype(name, entry.leaf, own)
        return new_tensor(entry, k, name=name, read=self.read, own=own, stored=stored)

    def _stored_dtype(self, name: str, leaf: str, own: np.dtype) -> str:
        """In which dtype a tensor goes out, in safetensors' words: the source's, else the leaf's own."""
        if self.record is not None:
            return self.record.other_dtypes.get(name, self.record.dtype)
        if own.name not in STORED_NAMES:
            raise UserError(f"{leaf} is {own.name}, which is not written; name the dtype with --dtype")
        return STORED_NAMES[own.name]

    def read_file(self, name: str) -> bytes:
        """The content of one of the source's files."""
        return self.files[name].read_bytes()


def _untouched(weights: Weights) -> Sequence[NewTensor]:
    """The tensors that are not the language model's. A step of adapters leaves them to its base."""
    if weights.base is not None:
        return _untouched(weights.base)
    if weights.source.kind == "hf":
        return stored_tensors(weights.hf.folder, weights.hf.carried)
    file = asset_paths(weights.path).get(f"{SOURCE}{UNTOUCHED_FILE}")
    folder = SafetensorsFolder(weights.path, {} if file is None else read_header(file))
    return stored_tensors(folder, tuple(folder.tensors))


def new_tensor(entry: LeafTensors, k: int, *, name: str, read: Read, own: np.dtype, stored: str) -> NewTensor:
    """The `k`-th tensor of a leaf, as it is to be written.

    Args:
        name: to write it under.
        read: gives parts of the leaf.
        own: the dtype that the leaf is stored in.
        stored: the dtype to write, in safetensors' words.
    """
    as_dtype = NUMPY_DTYPES[stored]

    def parts() -> Iterator[np.ndarray]:
        indices: Iterable[Index] = [(k,)] if entry.is_stacked else row_parts(entry, own)
        for index in indices:
            part = read(entry.leaf, index).astype(as_dtype, copy=False)
            yield part if entry.layout.is_identity else entry.layout.to_theirs(part, entry.sizes)

    return NewTensor(name=name, dtype=stored, shape=entry.their_shape, parts=parts)


def check_leaves(
    table: Sequence[LeafTensors], shapes: Mapping[str, jax.ShapeDtypeStruct], path: epath.Path
) -> None:
    """Raises UserError unless the leaves of the checkpoint at `path`, of these shapes, are the table's."""
    names = {entry.leaf for entry in table}
    wrong = [f"{name} is missing" for name in names - shapes.keys()]
    wrong += [f"{name} is not expected" for name in shapes.keys() - names]
    wrong += [
        f"{entry.leaf} is {list(shapes[entry.leaf].shape)} instead of {list(entry.shape)}"
        for entry in table
        if entry.leaf in shapes and shapes[entry.leaf].shape != entry.shape
    ]
    if wrong:
        raise UserError(f"{path} has not the weights that its assets describe: {listed(sorted(wrong))}")


def by_layer(tensor: NewTensor) -> list[tuple[int, str]]:
    """Sorts tensors by name, with layer 10 behind layer 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in tensor.name.split(".")]
