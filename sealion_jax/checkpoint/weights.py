"""Weights of any CHECKPOINT, ours or Hugging Face's, through one door."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from etils import epath

from sealion_jax.checkpoint import hf
from sealion_jax.checkpoint.hf_config import read_hf_config, read_model_json
from sealion_jax.checkpoint.layout import Assets, asset_paths
from sealion_jax.checkpoint.locate import CheckpointSource, resolve
from sealion_jax.checkpoint.trees import load_params
from sealion_jax.errors import UserError
from sealion_jax.model.config import Gemma3Config

MODEL_FILE = "model.json"
TOKENIZER_FILE = "tokenizer.model"
_SOURCE = "source/"


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A checkpoint that has been found and whose model is known; nothing large is read yet."""

    source: CheckpointSource
    config: Gemma3Config

    @property
    def path(self) -> epath.Path:
        return self.source.path

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

    def load(self, abstract: Any) -> Any:
        """The parameters as `abstract` wants them: a tree of ShapeDtypeStruct with shardings."""
        if self.source.kind == "hf":
            return hf.load_hf_params(self.path, abstract)
        return load_params(self.path, abstract)

    def assets(self) -> Assets:
        """What a run that starts here carries along to its export: configuration, chat template, vision."""
        if self.source.kind == "hf":
            return hf.source_assets(self.path)
        return source_assets(self.path)


def source_assets(step_dir: epath.Path) -> Assets:
    """What a step's directory carries from the Hugging Face directory that its run once started from."""
    return {name: path for name, path in asset_paths(step_dir).items() if name.startswith(_SOURCE)}


def open_weights(path: str) -> Weights:
    """The weights of a run (its newest good step), a step's directory, or a Hugging Face directory.

    Raises:
        UserError: there is no checkpoint, it is damaged, or it is of another architecture.
    """
    source = resolve(path)
    if source.kind == "hf":
        return Weights(source=source, config=read_hf_config(source.path))
    assets = asset_paths(source.path)
    if MODEL_FILE not in assets:
        raise UserError(
            f"{source.path} has no assets/{MODEL_FILE}, which tells the model's shapes; use another step"
        )
    return Weights(source=source, config=read_model_json(assets[MODEL_FILE].read_bytes()))
