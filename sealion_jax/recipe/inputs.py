"""What the inputs of a run hold, wherever they lie, and the model that one of them brings."""

from __future__ import annotations

import dataclasses
import hashlib
import json

from sealion_jax.data.mixture import Mixture
from sealion_jax.data.store.manifest import Manifest
from sealion_jax.model.config import Gemma3Config
from sealion_jax.recipe.config import TrainConfig
from sealion_jax.tokenizer import Tokenizer


def resolve_model(config: TrainConfig, model: Gemma3Config) -> TrainConfig:
    """The configuration with the checkpoint's `model` where the recipe leaves its shapes to that.

    Raises:
        UserError: the model does not fit the rest of the configuration.
    """
    return dataclasses.replace(config, model=model) if config.model is None else config


REFERENCE = "objective.reference"
"""The field that names the reference; its fingerprint is kept where none is named too."""


def input_fingerprints(
    tokenizer: Tokenizer, mixture: Mixture, *, reference: str | None = None, base: str | None = None
) -> dict[str, str]:
    """Path of a field that names an input -> sha256, in hex, of what that holds.

    Args:
        reference: fingerprint of the weights that preferences are measured against.
        base: fingerprint of the weights that adapters stand on.
    """
    stores = {
        f"data.sources.{name}.store": store_fingerprint(windows.store.manifest)
        for name, windows in zip(mixture.names, mixture.sources, strict=True)
    }
    weights = {"init_from": base, REFERENCE: reference}
    return {
        "tokenizer": tokenizer.fingerprint,
        **stores,
        **{field: fingerprint for field, fingerprint in weights.items() if fingerprint is not None},
    }


def store_fingerprint(manifest: Manifest) -> str:
    """sha256, in hex, over the names, sizes and hashes of a token store's tokens and arrays."""
    held = [dataclasses.astuple(file) for file in (*manifest.shards, *manifest.arrays)]
    return hashlib.sha256(json.dumps(held).encode()).hexdigest()
