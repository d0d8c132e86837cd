"""Weights of any CHECKPOINT, ours or Hugging Face's, through one door."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
from etils import epath

from sealion_jax.checkpoint import hf_assets
from sealion_jax.checkpoint.arrays import leaf_shapes, read_leaf
from sealion_jax.checkpoint.digests import fingerprint
from sealion_jax.checkpoint.hf_assets import CHAT_TEMPLATE_FILE, source_files
from sealion_jax.checkpoint.hf_chat import has_chat_template
from sealion_jax.checkpoint.hf_config import CONFIG_FILE, read_hf_config, read_model_json
from sealion_jax.checkpoint.hf_weights import HfWeights, load_hf_params
from sealion_jax.checkpoint.layout import ASSETS, PARAMS, Assets, asset_paths
from sealion_jax.checkpoint.locate import CheckpointSource, resolve
from sealion_jax.checkpoint.lora import LORA_FILE, LoraRecord, Read, load_leaves, merged_reader
from sealion_jax.checkpoint.processes import on_first_process
from sealion_jax.checkpoint.trees import load_params
from sealion_jax.errors import UserError
from sealion_jax.model.config import Gemma3Config
from sealion_jax.tokenizer import Tokenizer

MODEL_FILE = "model.json"
TOKENIZER_FILE = "tokenizer.model"
_SOURCE = "source/"


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A checkpoint that has been found and whose model is known; nothing large is read yet."""

    source: CheckpointSource
    config: Gemma3Config
    adapters: LoraRecord | None = None
    """Of a step that holds nothing else; it is read merged with its base."""
    base: Weights | None = None

    @property
    def path(self) -> epath.Path:
        return self.source.path

    @functools.cached_property
    def hf(self) -> HfWeights:
        """The opened directory, of a checkpoint in Hugging Face's form."""
        return HfWeights.open(self.path)

    @property
    def tokenizer_path(self) -> epath.Path:
        """The checkpoint's own tokenizer: a .model file, or a Hugging Face directory that should hold one.

        Raises:
            UserError: the checkpoint was made without one.
        """
        if self.source.kind == "hf":
            return self.path
        path = asset_paths(self.path).get(TOKENIZER_FILE)
        if path is None:
            raise UserError(
                f"{self.path} holds no tokenizer; name one with --tokenizer where the command has it, or "
                "convert the checkpoint again with --tokenizer"
            )
        return path

    def tokenizer_fingerprint(self) -> str | None:
        """Of the checkpoint's own tokenizer; None where it has none that can be read."""
        try:
            return Tokenizer.load(self.tokenizer_path).fingerprint
        except UserError:
            return None

    @property
    def has_chat_template(self) -> bool:
        """Whether it carries a chat template, as models that were tuned on chats do."""
        if self.source.kind == "hf":
            return has_chat_template(source_files(self.path))
        assets = asset_paths(self.path)
        return has_chat_template({name.removeprefix(_SOURCE): path for name, path in assets.items()})

    def load(self, abstract: Any) -> Any:
        """The parameters as `abstract` wants them: a tree of ShapeDtypeStruct with shardings."""
        if self.adapters is not None:
            return load_leaves(self.reader(), abstract)
        if self.source.kind == "hf":
            return load_hf_params(self.path, abstract)
        return load_params(self.path, abstract)

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape of each leaf, and the dtype that it is stored in; of adapters, what their base has."""
        if self.base is not None:
            return self.base.shapes()
        return self.hf.shapes if self.source.kind == "hf" else leaf_shapes(self.path)

    def reader(self) -> Read:
        """What reads any part of any leaf, in its own dtype; in float32 where an adapter is added."""
        if self.adapters is not None and self.base is not None:
            return merged_reader(self.base.reader(), self.path, self.adapters.lora)
        if self.source.kind == "hf":
            return self.hf.read
        return functools.partial(read_leaf, self.path)

    def fingerprint(self) -> str:
        """sha256, in hex, of the files that hold weights and shapes; they are read if need be, and once."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        if self.source.kind == "hf":
            belongs = lambda name: name.endswith(".safetensors") or name == CONFIG_FILE  # noqa: E731
        else:
            assets = [f"{ASSETS}/{name}" for name in (MODEL_FILE, LORA_FILE)]
            belongs = lambda name: name.startswith(f"{PARAMS}/") or name in assets  # noqa: E731
        return on_first_process(lambda: fingerprint(self.path, belongs=belongs))

    def assets(self) -> Assets:
        """What a run that starts here carries along to its export: configuration, chat template, vision."""
        if self.source.kind == "hf":
            return hf_assets.source_assets(self.path)
        # A step of adapters leaves what is large to its base.
        carried = {} if self.base is None else self.base.assets()
        return {**carried, **source_assets(self.path)}


def source_assets(step_dir: epath.Path) -> Assets:
    """What a step's directory carries along for an export.

    That is what came from a Hugging Face directory that its run once started from, and the chat template that
    it, or what it started from, was tuned with.
    """
    return {
        name: path
        for name, path in asset_paths(step_dir).items()
        if name.startswith(_SOURCE) or name == CHAT_TEMPLATE_FILE
    }


def open_weights(path: str, *, base: str | None = None) -> Weights:
    """The weights of a run (its newest good step), a step's directory, or a Hugging Face directory.

    Args:
        base: where the base of adapters is now, if it is not where it was.

    Raises:
        UserError: there is no checkpoint, it is damaged, or it is of another architecture; or it holds
            adapters whose base is gone or is another one by now; or a base is named and there are none.
    """
    source = resolve(path)
    assets = {} if source.kind == "hf" else asset_paths(source.path)
    if base is not None and LORA_FILE not in assets:
        raise UserError(f"{source.path} holds no adapters (LoRA) that would stand on {base}; name no base")
    if source.kind == "hf":
        return Weights(source=source, config=read_hf_config(source.path))
    if MODEL_FILE not in assets:
        raise UserError(
            f"{source.path} has no assets/{MODEL_FILE}, which tells the model's shapes; use another step"
        )
    config = read_model_json(assets[MODEL_FILE].read_bytes())
    if LORA_FILE not in assets:
        return Weights(source=source, config=config)
    adapters = LoraRecord.from_json(assets[LORA_FILE].read_bytes())
    return Weights(
        source=source, config=config, adapters=adapters, base=_open_base(source.path, adapters, base)
    )


def _open_base(step_dir: epath.Path, adapters: LoraRecord, moved_to: str | None) -> Weights:
    """What a step's adapters stand on; raises UserError if that is not to be had."""
    place = moved_to or adapters.base
    remedy = (
        f"Put it back, or merge the two with where it is now: python -m sealion_jax.convert to-hf {step_dir} "
        "DST --base DIR"
    )
    try:
        base = open_weights(place)
    except UserError as error:
        raise UserError(
            f"{step_dir} holds adapters (LoRA), and what they stand on cannot be read at {place}: {error}. "
            f"{remedy}"
        ) from error
    if base.fingerprint() != adapters.fingerprint:
        raise UserError(
            f"{step_dir} holds adapters (LoRA), and what lies at {place} is not what they were trained on: "
            f"its weights are others. {remedy}"
        )
    return base
