"""What of a Hugging Face directory is not the language model's weights, and is carried along untouched.

In a checkpoint's assets:

    source/config.json ...        small files, byte for byte
    source/tensors.json           how the source named its tensors, and their dtypes
    source/untouched.safetensors  tensors that are not the language model's (the vision tower)
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from etils import epath

from sealion_jax.checkpoint.hf_config import CONFIG_FILE, parse_json_object
from sealion_jax.checkpoint.hf_tokenizer import VOCABULARY_FILES
from sealion_jax.checkpoint.hf_weights import HfWeights
from sealion_jax.checkpoint.layout import Assets
from sealion_jax.checkpoint.safetensors_stream import SafetensorsFolder
from sealion_jax.checkpoint.safetensors_write import NewTensor, write_file
from sealion_jax.config_tree import from_plain, to_plain

SOURCE = "source/"
"""First part of the names of assets that came from a Hugging Face directory."""
MODEL_JSON = "model.json"
TENSORS_FILE = "tensors.json"
UNTOUCHED_FILE = "untouched.safetensors"
GENERATION_FILE = "generation_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
"""Also the name of the asset that a step has if it was tuned on chats or pairs."""
CHAT_TEMPLATE_JSON = "chat_template.json"
TEMPLATES = "additional_chat_templates"
PROCESSOR_FILE = "processor_config.json"
CARRIED_FILES = (
    CONFIG_FILE,
    GENERATION_FILE,
    *VOCABULARY_FILES,
    CHAT_TEMPLATE_FILE,
    CHAT_TEMPLATE_JSON,
    "preprocessor_config.json",
    PROCESSOR_FILE,
    "LICENSE",
    "NOTICE",
)
"""Small files that are carried. A model card is not among them: it is about the source."""

OnBytes = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class TensorRecord:
    """How a source named its tensors, so that an export does alike."""

    prefix: str
    """Of the language model's tensors."""
    dtype: str
    """Of most of them, in the words of safetensors."""
    head: str | None = None
    """The tensor that repeats the embedding."""
    other_dtypes: Mapping[str, str] = field(default_factory=dict)
    """Those of tensors that differ."""

    @classmethod
    def of(cls, weights: HfWeights) -> TensorRecord:
        dtypes = {name: weights.folder.tensors[name].dtype for name in weights.tensor_names}
        main = weights.main_dtype
        other = {name: dtype for name, dtype in dtypes.items() if dtype != main}
        return cls(prefix=weights.prefix, dtype=main, head=weights.head, other_dtypes=other)

    @classmethod
    def from_json(cls, content: bytes) -> TensorRecord:
        return from_plain(parse_json_object(content, TENSORS_FILE), cls, path=TENSORS_FILE)

    def to_json(self) -> bytes:
        return (json.dumps(to_plain(self, TensorRecord), indent=1) + "\n").encode()


def source_files(directory: epath.Path) -> dict[str, epath.Path]:
    """The small files of a Hugging Face directory that are carried along, by name."""
    files = {name: directory / name for name in CARRIED_FILES if (directory / name).exists()}
    templates = directory / TEMPLATES
    if templates.is_dir():
        found = sorted(templates.iterdir(), key=lambda path: path.name)
        files |= {f"{TEMPLATES}/{path.name}": path for path in found if path.suffix == ".jinja"}
    return files


def source_assets(directory: epath.PathLike, *, scratch: epath.PathLike | None = None) -> Assets:
    """The "source/..." assets of the checkpoints of a run that starts from a Hugging Face directory.

    Tensors that are not the language model's are written to a file in `scratch`, or in a temporary directory
    that is removed when the process ends. The caller adds model.json and tokenizer.model.
    """
    weights = HfWeights.open(directory)
    files = source_files(weights.folder.directory)
    assets: dict[str, bytes | epath.Path] = {
        f"{SOURCE}{name}": path.read_bytes() for name, path in files.items()
    }
    assets[f"{SOURCE}{TENSORS_FILE}"] = TensorRecord.of(weights).to_json()
    if weights.carried:
        if scratch is None:
            scratch = tempfile.mkdtemp(prefix="sealion-")
            atexit.register(shutil.rmtree, scratch, ignore_errors=True)
        epath.Path(scratch).mkdir(parents=True, exist_ok=True)
        file = epath.Path(scratch) / UNTOUCHED_FILE
        write_file(file, stored_tensors(weights.folder, weights.carried))
        assets[f"{SOURCE}{UNTOUCHED_FILE}"] = file
    return assets


def stored_tensors(folder: SafetensorsFolder, names: Sequence[str]) -> list[NewTensor]:
    """Tensors of a folder to write elsewhere, byte for byte."""
    return [
        NewTensor(
            name=name,
            dtype=folder.tensors[name].dtype,
            shape=folder.tensors[name].shape,
            parts=functools.partial(folder.raw, name),
        )
        for name in names
    ]
