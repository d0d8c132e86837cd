"""A checkpoint written in Hugging Face's form, one part of one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping

from etils import epath

from sealion_jax.checkpoint.hf_assets import GENERATION_FILE, OnBytes
from sealion_jax.checkpoint.hf_chat import chat_files, with_stops_in_config
from sealion_jax.checkpoint.hf_config import (
    CONFIG_FILE,
    fresh_hf_config,
    parse_hf_config,
    parse_json_object,
    updated_hf_config,
)
from sealion_jax.checkpoint.hf_exportable import STORED_NAMES, Exportable
from sealion_jax.checkpoint.hf_import import Conversion
from sealion_jax.checkpoint.hf_tokenizer import (
    MODEL_FILE,
    VOCABULARY_FILES,
    json_bytes,
    stop_ids,
    token_ids,
    tokenizer_files,
)
from sealion_jax.checkpoint.layout import copy_file
from sealion_jax.checkpoint.safetensors_stream import NUMPY_DTYPES
from sealion_jax.checkpoint.safetensors_write import write_shards
from sealion_jax.checkpoint.staging import new_directory
from sealion_jax.checkpoint.weights import open_weights
from sealion_jax.errors import UserError
from sealion_jax.tokenizer import Tokenizer

MAX_SHARD_BYTES = 5_000_000_000


def export_hf(
    checkpoint: epath.PathLike | Exportable,
    target: epath.PathLike,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_bytes: OnBytes = lambda count: None,
) -> Conversion:
    """Writes a checkpoint as a Hugging Face directory, which must not exist or be empty.

    What came from a Hugging Face source goes out as it came: names, files, schema of config.json, and each
    tensor's dtype. Without a source the weights keep the dtype they are stored in. What was tuned on chats
    goes out with the template it was tuned with, and stops generating where a turn ends. Adapters are merged
    with their base in float32, and rounded once.

    Args:
        checkpoint: a run directory, a step's, or a Hugging Face one (to change its dtype); or one opened.
        dtype: "float32" or "bfloat16" for all of the language model's tensors.
        on_bytes: told how many bytes have been written, again and again.

    Raises:
        UserError: another dtype, a checkpoint that is not whole, or `target` cannot be written; then nothing
            is left.
    """
    check_dtype(dtype)
    opened = isinstance(checkpoint, Exportable)
    source = checkpoint if opened else Exportable.of(open_weights(str(checkpoint)))
    tensors = source.tensors(dtype)
    main = NUMPY_DTYPES[tensors[0].dtype].name
    total = sum(tensor.nbytes for tensor in tensors)
    with new_directory(target, needs_bytes=total) as place:
        write_shards(place, tensors, max_shard_bytes=max_shard_bytes, on_bytes=on_bytes)
        files, notes = small_files(source)
        config = _config(source, dtype=dtype, main=main)
        # On gs:// the last one makes the directory valid.
        write_files(place, {GENERATION_FILE: _generation(source, config), **files, CONFIG_FILE: config})
    return Conversion(
        path=epath.Path(target),
        num_tensors=len(tensors),
        num_bytes=total,
        dtype=main,
        notes=(*notes, *_limits(source)),
    )


def check_dtype(dtype: str | None) -> None:
    """Raises UserError for a dtype that weights are not written in."""
    if dtype is not None and dtype not in STORED_NAMES:
        why = ": float16 overflows in Gemma 3 (its activations exceed 65,504)" if "16" in dtype else ""
        raise UserError(f"--dtype {dtype} is not supported{why}; use {' or '.join(sorted(STORED_NAMES))}")


def small_files(source: Exportable) -> tuple[dict[str, bytes | epath.Path], list[str]]:
    """(what goes out beside weights and config.json, what the user should know).

    The files are given by name, with their content or the path of a file to copy.
    """
    notes = []
    tokenizer = _tokenizer(source)
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
        notes += told
    files = {name: source.files[name] for name in names} | new | changed
    return {name: content for name, content in files.items() if content is not None}, notes


def write_files(place: epath.Path, files: Mapping[str, bytes | epath.Path]) -> None:
    """Writes files into a directory, in this order."""
    for name, content in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            (place / name).write_bytes(content)
        else:
            copy_file(content, place / name)


def _tokenizer(source: Exportable) -> Tokenizer | None:
    return None if source.tokenizer is None else Tokenizer(source.tokenizer)


def _config(source: Exportable, *, dtype: str | None, main: str) -> bytes:
    """config.json: the source's own bytes where nothing in it changes."""
    tokenizer = _tokenizer(source)
    if CONFIG_FILE not in source.files:
        return json_bytes(fresh_hf_config(source.config, dtype=main, ids=token_ids(tokenizer)))
    original = source.read_file(CONFIG_FILE)
    before = parse_json_object(original, CONFIG_FILE)
    is_other_dtype = (
        dtype is not None and source.record is not None and STORED_NAMES[dtype] != source.record.dtype
    )
    content = updated_hf_config(before, source.config, dtype=dtype if is_other_dtype else None)
    if source.chat_template is not None:
        content = with_stops_in_config(content, stop_ids(tokenizer))
    if parse_hf_config(content, CONFIG_FILE) != source.config:
        raise AssertionError(f"the new {CONFIG_FILE} does not describe this model: {content}")
    return original if content == before else json_bytes(content)


def _generation(source: Exportable, config: bytes) -> bytes:
    """generation_config.json for a source without one: the ids that config.json names, or the tokenizer's."""
    ids = token_ids(_tokenizer(source))
    content = parse_json_object(config, CONFIG_FILE)
    return json_bytes({key: ids[key] if content.get(key) is None else content[key] for key in ids})


def _limits(source: Exportable) -> list[str]:
    """Which versions of Transformers do not take such a model, a line each."""
    if source.config.model_dim % source.config.num_heads == 0:
        return []
    return [
        f"Transformers 5 refuses a model dim ({source.config.model_dim}) that is not a multiple of the "
        f"query heads ({source.config.num_heads}); version 4 takes it"
    ]
