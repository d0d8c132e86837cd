"""From a CHECKPOINT to a model that can be asked, and how its answers end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from jax.sharding import Mesh

from sealion_jax.checkpoint.weights import Weights, open_weights
from sealion_jax.errors import UserError
from sealion_jax.generation.config import Format, SamplingConfig
from sealion_jax.generation.generator import Completion, Generator
from sealion_jax.hardware import set_matmul_precision
from sealion_jax.layout import layout_of
from sealion_jax.model.config import ComputeConfig, Gemma3Config
from sealion_jax.model.gemma3 import (
    Gemma3,
    Params,
    abstract_params,
    binder,
    parameter_axes,
    with_matrices_in,
)
from sealion_jax.sharding import MeshConfig, make_mesh, param_shardings, with_shardings
from sealion_jax.tokenizer import Tokenizer

Reason = Literal["end_of_turn", "eos", "length"]


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model that can be asked: its parameters on the devices of a mesh."""

    config: Gemma3Config
    tokenizer: Tokenizer
    params: Params
    bind: Callable[[Params], Gemma3]
    mesh: Mesh

    def generator(self, sampling: SamplingConfig, *, batch_size: int, piece_tokens: int = 32) -> Generator:
        """What writes on after this model's prompts."""
        return Generator(
            self.bind,
            self.mesh,
            config=self.config,
            sampling=sampling,
            stop_ids=self.tokenizer.stop_ids,
            batch_size=batch_size,
            piece_tokens=piece_tokens,
        )


@dataclass(frozen=True, kw_only=True)
class FoundModel:
    """A checkpoint whose model and tokenizer are known; its weights are not read yet."""

    weights: Weights
    tokenizer: Tokenizer

    @property
    def format(self) -> Format:
        """That its prompts have unless a user says otherwise: chat if it carries a chat template."""
        return "chat" if self.weights.has_chat_template else "raw"

    def load(self, *, dtype: Literal["bfloat16", "float32"] = "float32", mesh_tensor: int = 1) -> LoadedModel:
        """The model with its weights, on all devices of this process.

        Args:
            dtype: of matrices, activations and cache.
            mesh_tensor: devices that a layer is split over; the rest split the parameters and the batch.
        """
        set_matmul_precision(dtype)
        config = self.weights.config
        mesh = make_mesh(MeshConfig(tensor=mesh_tensor))
        abstract = with_matrices_in(abstract_params(config), dtype)
        shardings = param_shardings(abstract, parameter_axes(config), mesh)
        compute = ComputeConfig(dtype=dtype, remat="none")
        return LoadedModel(
            config=config,
            tokenizer=self.tokenizer,
            params=self.weights.load(with_shardings(abstract, shardings)),
            bind=binder(config, compute=compute, layout=layout_of(mesh)),
            mesh=mesh,
        )


def find_model(checkpoint: str, *, tokenizer: str | None = None) -> FoundModel:
    """The model of a run (its newest good step), a step's directory, or a Hugging Face directory.

    Args:
        tokenizer: a .model file or a Hugging Face directory, instead of the checkpoint's own.

    Raises:
        UserError: there is no checkpoint or no tokenizer, or they do not fit each other.
    """
    weights = open_weights(checkpoint)
    found = Tokenizer.load(tokenizer or weights.tokenizer_path)
    if found.vocab_size > weights.config.vocab_size:
        raise UserError(
            f"the tokenizer has {found.vocab_size} pieces, the model of {checkpoint} only "
            f"{weights.config.vocab_size} embeddings; give the model's own with --tokenizer"
        )
    return FoundModel(weights=weights, tokenizer=found)


def reason(completion: Completion, tokenizer: Tokenizer) -> Reason:
    """Why a completion ended, in the words of the output."""
    if completion.stopped == "length":
        return "length"
    return "eos" if completion.ids[-1] == tokenizer.eos_id else "end_of_turn"
