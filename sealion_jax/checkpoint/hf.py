"""Whole checkpoints from and to Hugging Face's form, tensor by tensor.

    import_hf(directory, step_dir)   Hugging Face -> a step's directory
    export_hf(source, directory)     a step's directory (or Hugging Face, for another dtype) -> Hugging Face
    load_hf_params(directory, tree)  Hugging Face -> arrays on devices, nothing written
    source_assets(directory)         what a run that starts from Hugging Face carries, so that its checkpoints
                                     can be exported as the source was

Names and axes are in hf_names.py, configurations in hf_config.py.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from sealion_jax.checkpoint.arrays import Leaf, chunk_shape, write_leaves
from sealion_jax.checkpoint.digests import write_digests
from sealion_jax.checkpoint.hf_config import CONFIG_FILE, model_json
from sealion_jax.checkpoint.hf_tokenizer import FAST_FILE, MODEL_FILE, VOCABULARY_FILES, agrees
from sealion_jax.checkpoint.hf_weights import HfWeights
from sealion_jax.checkpoint.hf_weights import load_hf_params as load_hf_params
from sealion_jax.checkpoint.layout import Assets, write_assets
from sealion_jax.checkpoint.safetensors_stream import NewTensor, SafetensorsFolder, write_file
from sealion_jax.checkpoint.staging import new_directory
from sealion_jax.errors import UserError
from sealion_jax.tokenizer import Tokenizer

SOURCE = "source/"
"""Of the names of assets that came from a Hugging Face directory."""
TENSORS_FILE = "tensors.json"
"""How the source named its tensors, and their dtypes."""
UNTOUCHED_FILE = "untouched.safetensors"
"""The source's tensors that are not the language model's."""
GENERATION_FILE = "generation_config.json"
TEMPLATES = "additional_chat_templates"
CARRIED_FILES = (
    CONFIG_FILE,
    GENERATION_FILE,
    *VOCABULARY_FILES,
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE",
    "NOTICE",
)
"""Files that a checkpoint carries along. A model card is not among them: it is about the source."""

PART_BYTES = 64 * 2**20
"""About how much of a large unstacked array is held at a time."""

OnBytes = Callable[[int], None]


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
    model = _tokenizer_of(weights, files, tokenizer)
    total = sum(tensor.nbytes for tensor in weights.folder.tensors.values())
    with new_directory(target, needs_bytes=total) as place:
        write_leaves(place, _leaves(weights, on_bytes))
        small: dict[str, bytes | epath.Path] = {f"{SOURCE}{name}": path for name, path in files.items()}
        small |= {"model.json": model_json(weights.config), f"{SOURCE}{TENSORS_FILE}": tensors_json(weights)}
        small |= {} if model is None else {MODEL_FILE: model}
        write_assets(place, small)
        if weights.carried:
            write_file(
                place / "assets" / SOURCE / UNTOUCHED_FILE, untouched_tensors(weights.folder), on_bytes=on_bytes
            )
        write_digests(place)
    note = (
        f"{source} has no {MODEL_FILE}: set the recipe's tokenizer to train from this, or convert again with "
        "--tokenizer"
    )
    return Conversion(
        path=epath.Path(target),
        num_tensors=len(weights.folder.tensors),
        num_bytes=total,
        dtype=_main_dtype(weights),
        notes=(note,) if model is None else (),
    )


def source_assets(directory: epath.PathLike, *, scratch: epath.PathLike | None = None) -> Assets:
    """The "source/..." assets that checkpoints of a run which starts from a Hugging Face directory carry.

    Tensors that are not the language model's are written to a file in `scratch`, or in a temporary directory
    that is removed when the process ends. The caller adds model.json and tokenizer.model.
    """
    weights = HfWeights.open(directory)
    assets: dict[str, bytes | epath.Path] = {
        f"{SOURCE}{name}": path.read_bytes() for name, path in source_files(weights.folder.directory).items()
    }
    assets[f"{SOURCE}{TENSORS_FILE}"] = tensors_json(weights)
    if weights.carried:
        if scratch is None:
            scratch = tempfile.mkdtemp(prefix="sealion-")
            atexit.register(shutil.rmtree, scratch, ignore_errors=True)
        file = epath.Path(scratch) / UNTOUCHED_FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, untouched_tensors(weights.folder))
        assets[f"{SOURCE}{UNTOUCHED_FILE}"] = file
    return assets


def source_files(directory: epath.Path) -> dict[str, epath.Path]:
    """The small files of a Hugging Face directory that are carried along, by name."""
    files = {name: directory / name for name in CARRIED_FILES if (directory / name).exists()}
    templates = directory / TEMPLATES
    if templates.is_dir():
        files |= {f"{TEMPLATES}/{path.name}": path for path in templates.iterdir() if path.suffix == ".jinja"}
    return files


def tensors_json(weights: HfWeights) -> bytes:
    """The record of how a source named its tensors, so that an export does alike."""
    names = [name for entry in weights.table.values() for name in entry.names]
    dtypes = {name: weights.folder.tensors[name].dtype for name in names}
    main = dtypes[names[0]]
    content = {
        "prefix": weights.prefix,
        "head": weights.head,
        "dtype": main,
        "other_dtypes": {name: dtype for name, dtype in dtypes.items() if dtype != main},
    }
    return (json.dumps(content, indent=1) + "\n").encode()


def untouched_tensors(folder: SafetensorsFolder, names: tuple[str, ...] | None = None) -> list[NewTensor]:
    return []


def _leaves(weights: HfWeights, on_bytes: OnBytes) -> Iterator[Leaf]:
    """The model's leaves, each read in parts."""

    def parts(name: str, shape: tuple[int, ...], dtype: np.dtype) -> Iterator[tuple[Any, np.ndarray]]:
        for index in part_indices(name, shape, dtype):
            part = weights.read(name, index)
            yield index, part
            on_bytes(part.nbytes)

    for name, entry in weights.table.items():
        dtype = weights.dtype(name)
        yield Leaf(name, entry.shape, dtype, parts(name, entry.shape, dtype))
