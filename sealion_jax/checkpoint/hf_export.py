"""A checkpoint written in Hugging Face's form, one part of one tensor at a time."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from etils import epath

from sealion_jax.checkpoint.arrays import leaf_shapes, read_leaf
from sealion_jax.checkpoint.hf_assets import (
    CHAT_TEMPLATE_FILE,
    GENERATION_FILE,
    MODEL_JSON,
    SOURCE,
    TENSORS_FILE,
    UNTOUCHED_FILE,
    OnBytes,
    TensorRecord,
    source_files,
    stored_tensors,
)
from sealion_jax.checkpoint.hf_chat import chat_files, with_stops_in_config
from sealion_jax.checkpoint.hf_config import (
    CONFIG_FILE,
    fresh_hf_config,
    parse_hf_config,
    parse_json_object,
    read_model_json,
    updated_hf_config,
)
from sealion_jax.checkpoint.hf_import import Conversion, row_parts
from sealion_jax.checkpoint.hf_names import LeafTensors, name_table
from sealion_jax.checkpoint.hf_tokenizer import (
    MODEL_FILE,
    VOCABULARY_FILES,
    json_bytes,
    stop_ids,
    token_ids,
    tokenizer_files,
)
from sealion_jax.checkpoint.hf_weights import HfWeights, Index
from sealion_jax.checkpoint.layout import ASSETS, PARAMS, asset_paths, copy_file
from sealion_jax.checkpoint.safetensors_stream import NUMPY_DTYPES, SafetensorsFolder, listed, read_header
from sealion_jax.checkpoint.safetensors_write import NewTensor, write_shards
from sealion_jax.checkpoint.staging import new_directory
from sealion_jax.errors import UserError
from sealion_jax.model.config import Gemma3Config
from sealion_jax.tokenizer import Tokenizer

TEXT_PREFIX = "model."
"""Of the tensors of a model that never had other names."""
MAX_SHARD_BYTES = 5_000_000_000
STORED_NAMES = {dtype.name: name for name, dtype in NUMPY_DTYPES.items()}
"""Our name of a dtype -> that of safetensors."""


def export_hf(
    checkpoint: epath.PathLike,
    target: epath.PathLike,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_bytes: OnBytes = lambda count: None,
) -> Conversion:
    """Writes a checkpoint as a Hugging Face directory, which must not exist or be empty.

    What came from a Hugging Face source goes out as it came: names, files, schema of config.json, and each
    tensor's dtype. Without a source the weights keep the dtype they are stored in. What was tuned on chats
    goes out with the template it was tuned with, and stops generating where a turn ends.

    Args:
        checkpoint: a step's directory, or a Hugging Face one (to change its dtype).
        dtype: "float32" or "bfloat16" for all of the language model's tensors.
        on_bytes: told how many bytes have been written, again and again.

    Raises:
        UserError: another dtype, a checkpoint that is not whole, or `target` cannot be written; then nothing
            is left.
    """
    check_dtype(dtype)
    source = Exportable.open(checkpoint)
    tensors = source.tensors(dtype)
    main = tensors[0].dtype
    total = sum(tensor.nbytes for tensor in tensors)
    with new_directory(target, needs_bytes=total) as place:
        write_shards(place, tensors, max_shard_bytes=max_shard_bytes, on_bytes=on_bytes)
        notes = _write_files(place, source, dtype=dtype, main=NUMPY_DTYPES[main].name)
    return Conversion(
        path=epath.Path(target),
        num_tensors=len(tensors),
        num_bytes=total,
        dtype=NUMPY_DTYPES[main].name,
        notes=tuple(notes),
    )


def check_dtype(dtype: str | None) -> None:
    """Raises UserError for a dtype that weights are not written in."""
    if dtype is not None and dtype not in STORED_NAMES:
        why = ": float16 overflows in Gemma 3 (its activations exceed 65,504)" if "16" in dtype else ""
        raise UserError(f"--dtype {dtype} is not supported{why}; use {' or '.join(sorted(STORED_NAMES))}")


@dataclass(frozen=True, kw_only=True)
class Exportable:
    """A checkpoint of either kind, as an export sees it."""

    path: epath.Path
    config: Gemma3Config
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    """Of each leaf."""
    read: Callable[[str, Index], np.ndarray]
    tokenizer: bytes | None
    chat_template: bytes | None
    """The one it was tuned with; what came from a source is among the files."""
    files: Mapping[str, epath.Path]
    """What came from a Hugging Face source, by its name there."""
    record: TensorRecord | None
    """How that source named its tensors."""
    untouched: Sequence[NewTensor]

    @classmethod
    def open(cls, checkpoint: epath.PathLike) -> Exportable:
        """A step's directory, or a Hugging Face one. Raises UserError if it is neither, or is not whole."""
        place = epath.Path(checkpoint)
        return cls._open_step(place) if (place / PARAMS).is_dir() else cls._open_hf(place)

    @classmethod
    def _open_step(cls, place: epath.Path) -> Exportable:
        assets = asset_paths(place)
        if MODEL_JSON not in assets:
            raise UserError(
                f"{place} has no {ASSETS}/{MODEL_JSON}, which says what model it is; it is not whole"
            )
        files = {name.removeprefix(SOURCE): path for name, path in assets.items() if name.startswith(SOURCE)}
        record = files.pop(TENSORS_FILE, None)
        untouched = files.pop(UNTOUCHED_FILE, None)
        folder = SafetensorsFolder(place, {} if untouched is None else read_header(untouched))
        return cls(
            path=place,
            config=read_model_json(assets[MODEL_JSON].read_bytes()),
            shapes=leaf_shapes(place),
            read=functools.partial(read_leaf, place),
            tokenizer=assets[MODEL_FILE].read_bytes() if MODEL_FILE in assets else None,
            chat_template=assets[CHAT_TEMPLATE_FILE].read_bytes() if CHAT_TEMPLATE_FILE in assets else None,
            files=files,
            record=None if record is None else TensorRecord.from_json(record.read_bytes()),
            untouched=stored_tensors(folder, tuple(folder.tensors)),
        )

    @classmethod
    def _open_hf(cls, place: epath.Path) -> Exportable:
        weights = HfWeights.open(place)
        files = source_files(place)
        return cls(
            path=place,
            config=weights.config,
            shapes={
                leaf: jax.ShapeDtypeStruct(entry.shape, weights.dtype(leaf))
                for leaf, entry in weights.table.items()
            },
            read=weights.read,
            tokenizer=files[MODEL_FILE].read_bytes() if MODEL_FILE in files else None,
            chat_template=None,
            files=files,
            record=TensorRecord.of(weights),
            untouched=stored_tensors(weights.folder, weights.carried),
        )

    @property
    def num_params(self) -> int:
        """Elements of all tensors, the head left out."""
        return sum(math.prod(tensor.shape) for tensor in (*self.shapes.values(), *self.untouched))

    def tensors(self, dtype: str | None) -> list[NewTensor]:
        """Everything to be written, in order, each read when it is written."""
        table = name_table(self.config, self.record.prefix if self.record else TEXT_PREFIX)
        _check_leaves(table, self)
        tensors = [_tensor(entry, k, self, dtype) for entry in table for k in range(len(entry.names))]
        tensors.sort(key=lambda tensor: _by_layer(tensor.name))
        head = self.record.head if self.record else None
        repeated = [_tensor(table[0], 0, self, dtype, name=head)] if head else []
        return [*tensors, *repeated, *self.untouched]

    def num_bytes(self, dtype: str | None) -> int:
        """What an export writes."""
        return sum(tensor.nbytes for tensor in self.tensors(dtype))

    def read_file(self, name: str) -> bytes:
        """The content of one of the source's files."""
        return self.files[name].read_bytes()

    def stored_dtype(self, name: str, leaf: str) -> str:
        """In which dtype a tensor goes out, in safetensors' words: the source's, else the leaf's own."""
        if self.record is not None:
            return self.record.other_dtypes.get(name, self.record.dtype)
        own = np.dtype(self.shapes[leaf].dtype).name
        if own not in STORED_NAMES:
            raise UserError(f"{leaf} is {own}, which is not written; name the dtype with --dtype")
        return STORED_NAMES[own]


def _check_leaves(table: Sequence[LeafTensors], source: Exportable) -> None:
    """Raises UserError unless the checkpoint has exactly the model's leaves."""
    names = {entry.leaf for entry in table}
    wrong = [f"{name} is missing" for name in names - source.shapes.keys()]
    wrong += [f"{name} is not expected" for name in source.shapes.keys() - names]
    wrong += [
        f"{entry.leaf} is {list(source.shapes[entry.leaf].shape)} instead of {list(entry.shape)}"
        for entry in table
        if entry.leaf in source.shapes and source.shapes[entry.leaf].shape != entry.shape
    ]
    if wrong:
        raise UserError(
            f"{source.path} has not the weights that its {MODEL_JSON} describes: {listed(sorted(wrong))}"
        )


def _by_layer(name: str) -> list[tuple[int, str]]:
    """Sorts names with layer 10 behind layer 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _tensor(
    entry: LeafTensors, k: int, source: Exportable, dtype: str | None, *, name: str | None = None
) -> NewTensor:
    """The `k`-th tensor of a leaf, as it is to be written."""
    name = name or entry.names[k]
    stored = STORED_NAMES[dtype] if dtype else source.stored_dtype(name, entry.leaf)
    as_dtype = NUMPY_DTYPES[stored]
    own = np.dtype(source.shapes[entry.leaf].dtype)

    def parts() -> Iterator[np.ndarray]:
        indices: Iterable[Index] = [(k,)] if entry.is_stacked else row_parts(entry, own)
        for index in indices:
            part = source.read(entry.leaf, index).astype(as_dtype, copy=False)
            yield part if entry.layout.is_identity else entry.layout.to_theirs(part, entry.sizes)

    return NewTensor(name=name, dtype=stored, shape=entry.their_shape, parts=parts)


def _write_files(place: epath.Path, source: Exportable, *, dtype: str | None, main: str) -> list[str]:
    """Writes everything but the weights, config.json last; returns what the user should know."""
    notes = []
    tokenizer = Tokenizer(source.tokenizer) if source.tokenizer is not None else None
    new, carried = tokenizer_files(source.tokenizer, source.files, read=source.read_file)
    if new and any(name in source.files for name in VOCABULARY_FILES[1:]):
        notes.append(
            "the source's tokenizer files are left out: the checkpoint was trained with another tokenizer"
        )
    if tokenizer is None and not carried:
        notes.append(f"the checkpoint has no tokenizer: put {MODEL_FILE} and its settings there yourself")
    skipped = {*VOCABULARY_FILES, CONFIG_FILE}
    names = [*carried, *(name for name in source.files if name not in skipped)]
    changed: dict[str, bytes | None] = {}
    if source.chat_template is not None:
        changed, told = chat_files(source.chat_template, stop_ids(tokenizer), names, read=source.read_file)
        new |= {name: content for name, content in changed.items() if content is not None}
        notes += told
    for name in (name for name in names if name not in changed):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        copy_file(source.files[name], place / name)
    config, old = _config(source, tokenizer, dtype=dtype, main=main)
    if GENERATION_FILE not in source.files:
        ids = {key: config[key] for key in token_ids(tokenizer) if config.get(key) is not None}
        new[GENERATION_FILE] = json_bytes({**token_ids(tokenizer), **ids})
    new[CONFIG_FILE] = old if old is not None else json_bytes(config)
    for name, content in new.items():
        (place / name).write_bytes(content)
    if source.config.model_dim % source.config.num_heads:
        notes.append(
            f"Transformers 5 refuses a model dim ({source.config.model_dim}) that is not a multiple of the "
            f"query heads ({source.config.num_heads}); version 4 takes it"
        )
    return notes


def _config(
    source: Exportable, tokenizer: Tokenizer | None, *, dtype: str | None, main: str
) -> tuple[dict, bytes | None]:
    """The content of config.json, and the source's own bytes where nothing in it changes."""
    if CONFIG_FILE not in source.files:
        content = fresh_hf_config(source.config, dtype=main, ids=token_ids(tokenizer))
        return content, None
    original = source.files[CONFIG_FILE].read_bytes()
    before = parse_json_object(original, CONFIG_FILE)
    is_other_dtype = (
        dtype is not None and source.record is not None and STORED_NAMES[dtype] != source.record.dtype
    )
    content = updated_hf_config(before, source.config, dtype=dtype if is_other_dtype else None)
    if source.chat_template is not None:
        content = with_stops_in_config(content, stop_ids(tokenizer))
    if parse_hf_config(content, CONFIG_FILE) != source.config:
        raise AssertionError(f"the new {CONFIG_FILE} does not describe this model: {content}")
    return content, original if content == before else None
