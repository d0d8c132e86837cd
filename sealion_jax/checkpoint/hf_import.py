"""A Hugging Face directory written as a step's directory, one part of one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from etils import epath

from sealion_jax.checkpoint.arrays import Leaf, chunk_shape, write_leaves
from sealion_jax.checkpoint.digests import write_digests
from sealion_jax.checkpoint.hf_assets import (
    MODEL_JSON,
    SOURCE,
    TENSORS_FILE,
    UNTOUCHED_FILE,
    OnBytes,
    TensorRecord,
    source_files,
    stored_tensors,
)
from sealion_jax.checkpoint.hf_config import model_json
from sealion_jax.checkpoint.hf_names import LeafTensors
from sealion_jax.checkpoint.hf_tokenizer import FAST_FILE, MODEL_FILE, agrees
from sealion_jax.checkpoint.hf_weights import HfWeights, Index
from sealion_jax.checkpoint.layout import ASSETS, write_assets
from sealion_jax.checkpoint.safetensors_stream import NUMPY_DTYPES
from sealion_jax.checkpoint.safetensors_write import write_file
from sealion_jax.checkpoint.staging import new_directory
from sealion_jax.errors import UserError
from sealion_jax.model.config import Gemma3Config
from sealion_jax.tokenizer import Tokenizer

PART_BYTES = 64 * 2**20
"""About how much of a large unstacked array is held at a time."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was written."""

    path: epath.Path
    num_tensors: int
    num_bytes: int
    dtype: str
    notes: tuple[str, ...] = ()
    """What the user should know, a line each."""


def import_hf(
    source: epath.PathLike,
    target: epath.PathLike,
    *,
    tokenizer: epath.PathLike | None = None,
    on_bytes: OnBytes = lambda count: None,
) -> Conversion:
    """Writes a Hugging Face directory as a step's directory, which must not exist or be empty.

    Args:
        tokenizer: a SentencePiece model for a source without tokenizer.model.
        on_bytes: told how many bytes of weights have been handed on, again and again.

    Raises:
        UserError: the source is damaged or no Gemma 3, or `target` cannot be written; nothing is left then.
    """
    weights = HfWeights.open(source)
    files = source_files(weights.folder.directory)
    model = _model_for(weights.config, files, tokenizer)
    with new_directory(target, needs_bytes=weights.num_bytes) as place:
        write_leaves(place, _leaves(weights, on_bytes))
        assets: dict[str, bytes | epath.Path] = {f"{SOURCE}{name}": path for name, path in files.items()}
        assets[MODEL_JSON] = model_json(weights.config)
        assets[f"{SOURCE}{TENSORS_FILE}"] = TensorRecord.of(weights).to_json()
        if model is not None:
            assets[MODEL_FILE] = model
        write_assets(place, assets)
        if weights.carried:
            untouched = stored_tensors(weights.folder, weights.carried)
            write_file(place / ASSETS / SOURCE / UNTOUCHED_FILE, untouched, on_bytes=on_bytes)
        write_digests(place)
    note = (
        f"no {MODEL_FILE} in the source: name the tokenizer in the recipe, or convert again with --tokenizer"
    )
    return Conversion(
        path=epath.Path(target),
        num_tensors=len(weights.tensor_names) + len(weights.carried),
        num_bytes=weights.num_bytes,
        dtype=NUMPY_DTYPES[weights.main_dtype].name,
        notes=() if model is not None else (note,),
    )


def _leaves(weights: HfWeights, on_bytes: OnBytes) -> Iterator[Leaf]:
    """The model's leaves, each read in parts."""

    def parts(entry: LeafTensors, dtype: np.dtype) -> Iterator[tuple[Index, np.ndarray]]:
        indices = (
            [(block,) for block in range(len(entry.names))] if entry.is_stacked else row_parts(entry, dtype)
        )
        for index in indices:
            part = weights.read(entry.leaf, index)
            yield index, part
            on_bytes(part.nbytes)

    for name, entry in weights.table.items():
        dtype = weights.dtype(name)
        yield Leaf(name, entry.shape, dtype, parts(entry, dtype))


def row_parts(entry: LeafTensors, dtype: np.dtype) -> Iterator[Index]:
    """Indices that cut an unstacked leaf into parts along its chunks; one whose axes move is left whole."""
    row_bytes = dtype.itemsize * int(np.prod(entry.shape[1:], dtype=int))
    if not entry.layout.is_identity or entry.shape[0] * row_bytes <= PART_BYTES:
        yield ()
        return
    chunk = chunk_shape(entry.leaf, entry.shape, dtype)[0]
    step = max(1, PART_BYTES // (chunk * row_bytes)) * chunk
    for start in range(0, entry.shape[0], step):
        yield (slice(start, min(start + step, entry.shape[0])),)


def _model_for(
    config: Gemma3Config, files: Mapping[str, epath.Path], tokenizer: epath.PathLike | None
) -> bytes | None:
    """The SentencePiece model of an import: the source's own, or the one that was named for it."""
    if tokenizer is None:
        return Tokenizer.load(files[MODEL_FILE]).model_bytes if MODEL_FILE in files else None
    named = Tokenizer.load(tokenizer)
    if named.vocab_size > config.vocab_size:
        raise UserError(
            f"{tokenizer} has {named.vocab_size} pieces, the model only {config.vocab_size} embeddings; "
            "name the model's own tokenizer"
        )
    has_own = MODEL_FILE in files or FAST_FILE in files
    if has_own and not agrees(named, files, read=lambda name: files[name].read_bytes()):
        raise UserError(f"{tokenizer} gives other ids than the source's own tokenizer; name the model's own")
    return named.model_bytes
