"""What a recipe names, opened, and checked against each other and the devices; no state yet."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optax
from jax.sharding import Mesh

from sealion_jax.checkpoint.weights import Weights, open_weights
from sealion_jax.data.mixture import Mixture, open_mixture
from sealion_jax.errors import UserError
from sealion_jax.evaluation.perplexity import EvaluationSet, load_sets
from sealion_jax.model.config import Gemma3Config
from sealion_jax.model.gemma3 import Gemma3, binder
from sealion_jax.optimizer import adamw
from sealion_jax.recipe import TrainConfig
from sealion_jax.sharding import activation_layout, check_batch_divides, make_mesh
from sealion_jax.tokenizer import Tokenizer
from sealion_jax.training.state import TrainState, abstract_state


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A recipe made real, but for its weights and optimizer state."""

    config: TrainConfig
    model: Gemma3Config
    tokenizer: Tokenizer
    mesh: Mesh
    mixture: Mixture
    weights: Weights | None
    """Where training starts from; None draws weights at random, or goes on from the run's own."""
    transform: optax.GradientTransformation
    abstract: TrainState
    bind: Callable[[Any], Gemma3]
    sets: list[EvaluationSet]


def build(config: TrainConfig, *, model: Gemma3Config | None = None) -> Parts:
    """Everything the recipe names.

    Args:
        model: of a run that goes on, as its checkpoints have it; then `init_from` is not looked at any more.

    Raises:
        UserError: something is missing, or does not fit the rest or the devices.
    """
    mesh = make_mesh(config.mesh)
    check_batch_divides(config.global_batch_size, config.microbatches, mesh)
    weights = open_weights(config.init_from) if config.init_from and model is None else None
    model = model or _model_config(config, weights)
    tokenizer = Tokenizer.load(config.tokenizer)
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"the tokenizer {config.tokenizer} has {tokenizer.vocab_size} pieces, the model only "
            f"{model.vocab_size} embeddings; give the model's own tokenizer, or raise model.vocab_size"
        )
    transform = adamw(config.optimizer)
    return Parts(
        config=config,
        model=model,
        tokenizer=tokenizer,
        mesh=mesh,
        mixture=open_mixture(
            config.data,
            sequence_length_tokens=config.sequence_length_tokens,
            global_batch_size=config.global_batch_size,
            tokenizer=tokenizer,
        ),
        weights=weights,
        transform=transform,
        abstract=abstract_state(model, transform, mesh),
        bind=binder(model, compute=config.compute, constrain=activation_layout(mesh)),
        sets=load_sets(config.evaluation, tokenizer, context=config.sequence_length_tokens),
    )


def _model_config(config: TrainConfig, weights: Weights | None) -> Gemma3Config:
    """The recipe's model, or that of the weights it starts from; where both are given they must agree."""
    if weights is None:
        assert config.model is not None  # TrainConfig demands one of the two
        return config.model
    if config.model is not None and config.model != weights.config:
        theirs, ours = dataclasses.asdict(weights.config), dataclasses.asdict(config.model)
        different = [
            f"{name}: {ours[name]} here, {theirs[name]} there" for name in ours if ours[name] != theirs[name]
        ]
        raise UserError(
            f"the recipe's model is not that of init_from {config.init_from}: {'; '.join(different)}. "
            "Correct it, or set model to None to take theirs"
        )
    return weights.config
