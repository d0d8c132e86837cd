"""What a recipe names, opened, and checked against each other and the devices; no state yet."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jax.sharding import Mesh

from sealion_jax.checkpoint.lora import LoraRecord
from sealion_jax.checkpoint.weights import Weights, open_weights
from sealion_jax.data.mixture import Mixture, open_mixture
from sealion_jax.errors import UserError
from sealion_jax.evaluation.pairs import PairReference
from sealion_jax.evaluation.perplexity import EvaluationSet, Scorer, load_sets
from sealion_jax.model.config import Gemma3Config
from sealion_jax.model.gemma3 import Gemma3
from sealion_jax.objectives.preference_config import PreferenceConfig
from sealion_jax.recipe import TrainConfig
from sealion_jax.run.update import UpdateParts, on_mesh, update_parts
from sealion_jax.sharding import make_mesh
from sealion_jax.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Parts(UpdateParts):
    """A recipe made real, but for its weights and optimizer state."""

    tokenizer: Tokenizer
    mixture: Mixture
    weights: Weights | None
    """Where training starts from; None draws weights at random, or goes on from the run's own.

    With LoRA they are the adapters' base, and are there when a run goes on, too.
    """
    adapters: LoraRecord | None
    """With LoRA, what is trained and on what it stands."""
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
    def reference_path(self) -> str | None:
        """The CHECKPOINT that preferences are measured against, if they are, and if it is one."""
        return (self.preferences.reference or self.config.init_from) if self.needs_reference else None

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
    config = on_mesh(config, mesh)
    weights = _weights(config, goes_on=model is not None)
    model = model or _model_config(config, weights)
    tokenizer = Tokenizer.load(config.tokenizer)
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"the tokenizer {config.tokenizer} has {tokenizer.vocab_size} pieces, the model only "
            f"{model.vocab_size} embeddings; give the model's own tokenizer, or raise model.vocab_size"
        )
    mixture = open_mixture(
        config.data,
        sequence_length_tokens=config.sequence_length_tokens,
        global_batch_size=config.global_batch_size,
        tokenizer=tokenizer,
    )
    _check_kind(config, mixture)
    step = update_parts(config, model, mesh, num_sources=len(mixture.names))
    return Parts(
        **vars(step),
        tokenizer=tokenizer,
        mixture=mixture,
        weights=weights,
        adapters=_adapters(config, weights),
        sets=load_sets(config.evaluation, tokenizer, context=config.sequence_length_tokens),
        scorer=make_scorer(config, step.bind, mesh, eos_id=tokenizer.eos_id),
    )


def open_reference(parts: Parts) -> Weights:
    """The checkpoint that `objective.reference` names.

    Raises:
        UserError: it is not there, or its log-probabilities of these rows would mean nothing.
    """
    path = parts.preferences.reference
    assert path is not None
    weights = open_weights(path)
    tokenizer, model = parts.tokenizer, weights.config
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} pieces, objective.reference {path} only "
            f"{model.vocab_size} embeddings; give a reference that reads them all"
        )
    if weights.tokenizer_fingerprint() not in (None, tokenizer.fingerprint):
        raise UserError(
            f"objective.reference {path} has another tokenizer than this run, so its log-probabilities do "
            "not compare with the policy's; give a reference with the same one"
        )
    if model.max_context_tokens < parts.config.sequence_length_tokens:
        raise UserError(
            f"objective.reference {path} has a context of {model.max_context_tokens} tokens, fewer than "
            f"sequence_length_tokens ({parts.config.sequence_length_tokens}); give one that reads whole rows"
        )
    return weights


def make_scorer(config: TrainConfig, bind: Callable[[Any], Gemma3], mesh: Mesh, *, eos_id: int) -> Scorer:
    """What scores held-out sets with a model as the recipe wants it."""
    return Scorer(
        bind,
        mesh,
        batch_size=config.evaluation.batch_size,
        row_length=config.sequence_length_tokens,
        eos_id=eos_id,
    )


def _check_kind(config: TrainConfig, mixture: Mixture) -> None:
    """Raises UserError unless the objective can learn from the mixture's rows."""
    has_pairs = mixture.sources[0].store.kind == "pairs"  # then all have, see `open_mixture`
    learns_pairs = isinstance(config.objective, PreferenceConfig)
    if learns_pairs and not has_pairs:
        raise UserError(
            f"the objective learns preferences, and source {mixture.names[0]} holds no pairs; prepare "
            "pairs with --kind pairs, or choose the objective CausalLMConfig"
        )
    if has_pairs and not learns_pairs:
        raise UserError(
            f"source {mixture.names[0]} holds pairs, and the objective learns the next token; choose the "
            "objective PreferenceConfig, or prepare chats with --kind chats"
        )


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
