"""What a recipe names, opened, and checked against each other and the devices; no state yet."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import optax
from jax.sharding import Mesh

from sealion_jax.checkpoint.lora import LoraRecord
from sealion_jax.checkpoint.weights import Weights, open_weights
from sealion_jax.data.mixture import Mixture, open_mixture
from sealion_jax.errors import UserError
from sealion_jax.evaluation.pairs import PairReference
from sealion_jax.evaluation.perplexity import EvaluationSet, Scorer, load_sets
from sealion_jax.model.config import Gemma3Config
from sealion_jax.model.gemma3 import Gemma3, binder
from sealion_jax.objectives.base import LOGITS_BYTES_PER_DEVICE, Objective
from sealion_jax.objectives.causal_lm import CausalLM
from sealion_jax.objectives.preference import Preference
from sealion_jax.objectives.preference_config import PreferenceConfig
from sealion_jax.optimizer import adamw
from sealion_jax.recipe import TrainConfig
from sealion_jax.sharding import activation_layout, batch_devices, check_batch_divides, make_mesh
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
    """Where training starts from; None draws weights at random, or goes on from the run's own.

    With LoRA they are the adapters' base, and are there when a run goes on, too.
    """
    adapters: LoraRecord | None
    """With LoRA, what is trained and on what it stands."""
    transform: optax.GradientTransformation
    abstract: TrainState
    bind: Callable[[Any], Gemma3]
    objective: Objective
    sets: list[EvaluationSet]
    scorer: Scorer
    references: Mapping[str, PairReference] = field(default_factory=dict)
    """Of held-out sets of pairs, by name, what the reference gives them."""

    @property
    def preferences(self) -> PreferenceConfig:
        """The objective's configuration, of a run that learns preferences."""
        assert isinstance(self.config.objective, PreferenceConfig)
        return self.config.objective

    @property
    def needs_reference(self) -> bool:
        """Whether rows must have the log-probabilities of a reference."""
        objective = self.config.objective
        return isinstance(objective, PreferenceConfig) and objective.needs_reference

    @property
    def learns_chats(self) -> bool:
        """Whether anything that is learned is in the chat format."""
        return any(source.store.kind != "text" for source in self.mixture.sources)


def build(config: TrainConfig, *, model: Gemma3Config | None = None) -> Parts:
    """Everything the recipe names.

    Args:
        model: of a run that goes on, as its checkpoints have it; then `init_from` is not looked at any more,
            unless it is the base of adapters.

    Raises:
        UserError: something is missing, or does not fit the rest or the devices.
    """
    mesh = make_mesh(config.mesh)
    check_batch_divides(config.global_batch_size, config.microbatches, mesh)
    weights = _weights(config, goes_on=model is not None)
    model = model or _model_config(config, weights)
    tokenizer = Tokenizer.load(config.tokenizer)
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"the tokenizer {config.tokenizer} has {tokenizer.vocab_size} pieces, the model only "
            f"{model.vocab_size} embeddings; give the model's own tokenizer, or raise model.vocab_size"
        )
    transform = adamw(config.optimizer)
    mixture = open_mixture(
        config.data,
        sequence_length_tokens=config.sequence_length_tokens,
        global_batch_size=config.global_batch_size,
        tokenizer=tokenizer,
    )
    bind = binder(model, compute=config.compute, constrain=activation_layout(mesh), lora=config.lora)
    return Parts(
        config=config,
        model=model,
        tokenizer=tokenizer,
        mesh=mesh,
        mixture=mixture,
        weights=weights,
        adapters=_adapters(config, weights),
        transform=transform,
        abstract=abstract_state(model, transform, mesh, lora=config.lora, frozen_dtype=config.compute.dtype),
        bind=bind,
        objective=_objective(config, mixture, mesh),
        sets=load_sets(config.evaluation, tokenizer, context=config.sequence_length_tokens),
        scorer=make_scorer(config, bind, mesh, eos_id=tokenizer.eos_id),
    )


def make_scorer(config: TrainConfig, bind: Callable[[Any], Gemma3], mesh: Mesh, *, eos_id: int) -> Scorer:
    """What scores held-out sets with a model as the recipe wants it."""
    return Scorer(
        bind,
        mesh,
        batch_size=config.evaluation.batch_size,
        row_length=config.sequence_length_tokens,
        eos_id=eos_id,
    )


def _objective(config: TrainConfig, mixture: Mixture, mesh: Mesh) -> Objective:
    """What the recipe's objective makes of the mixture's rows."""
    has_pairs = mixture.sources[0].store.kind == "pairs"  # then all have, see `open_mixture`
    logits_bytes = LOGITS_BYTES_PER_DEVICE * batch_devices(mesh)
    if isinstance(config.objective, PreferenceConfig):
        if not has_pairs:
            raise UserError(
                f"the objective learns preferences, and source {mixture.names[0]} holds no pairs; prepare "
                "pairs with --kind pairs, or choose the objective CausalLMConfig"
            )
        return Preference(config=config.objective, num_sources=len(mixture.names), logits_bytes=logits_bytes)
    if has_pairs:
        raise UserError(
            f"source {mixture.names[0]} holds pairs, and the objective learns the next token; choose the "
            "objective PreferenceConfig, or prepare chats with --kind chats"
        )
    return CausalLM(num_sources=len(mixture.names), logits_bytes=logits_bytes)


def _weights(config: TrainConfig, *, goes_on: bool) -> Weights | None:
    """What `init_from` names, where it is needed."""
    if config.init_from is None or (goes_on and config.lora is None):
        return None
    try:
        return open_weights(config.init_from)
    except UserError as error:
        if not goes_on:
            raise
        raise UserError(
            f"init_from: {error}. This run's adapters (LoRA) stand on it: put it back, or say where it is "
            "now with --init-from"
        ) from error


def _adapters(config: TrainConfig, weights: Weights | None) -> LoraRecord | None:
    """What the checkpoints of a run with LoRA say of their adapters."""
    if config.lora is None or weights is None:
        return None
    return LoraRecord(lora=config.lora, base=str(weights.path), fingerprint=weights.fingerprint())


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
