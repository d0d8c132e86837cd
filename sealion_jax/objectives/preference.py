"""Learning from pairs of answers, the DPO family: packed rows in, a weighted sum of losses out.

A segment of a row is a prompt with one answer; `loss_mask` is 1 where an answer's token or its closing
<end_of_turn> is predicted. Both answers of a pair are in the same row, so rows can be split over devices and
microbatches. A row has R places for pairs; a place names the two segments of its pair, or is empty (0, 0).
Two pairs, a and b, with answers + and -, in a row of T = 16 with R = 3:

                         a+          a-             b-       b+
    segment_ids          1  1  1  1  2  2  2  2  2  3  3  3  4  4  .  .
    loss_mask            0  1  1  0  0  1  1  1  0  1  1  0  1  0  .  .

    chosen_segment       1     4     0
    rejected_segment     2     3     0
    reference_chosen   -7.1  -2.3    .      log-probabilities under the reference, summed over the answer
    reference_rejected -9.4  -5.8    .

Beside the fields of every batch (`tokens`, `targets`, `segment_ids`, `positions`, `loss_mask` [B, T] and
`source` [B]) there are `chosen_segment`, `rejected_segment` int32 [B, R] and, where a loss asks for them,
`reference_chosen`, `reference_rejected` float32 [B, R].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sealion_jax.model.gemma3 import Gemma3
from sealion_jax.objectives.base import BY_SOURCE, Batch, Metric
from sealion_jax.objectives.preference_config import Answers, Pairs, PreferenceConfig

PairValues = Float[Array, "B R"]


@dataclass(frozen=True, kw_only=True)
class Preference:
    """A weighted sum of losses, each averaged over the pairs (or chosen tokens) of the global batch."""

    config: PreferenceConfig
    num_sources: int
    """Sources of the mixture: every metric is also reported for each."""

    def normalisers(self, batch: Batch) -> dict[str, jax.Array]:
        """`pairs` and `chosen_tokens` (learned tokens of chosen answers) of the global batch, at least 1."""
        real = _is_pair(batch)
        mask = batch["loss_mask"].astype(jnp.float32)
        tokens = segment_sums(mask, batch["segment_ids"], batch["chosen_segment"])
        return {
            "pairs": jnp.maximum(jnp.sum(real.astype(jnp.float32)), 1.0),
            "chosen_tokens": jnp.maximum(jnp.sum(tokens, where=real), 1.0),
        }

    def loss(
        self, model: Gemma3, microbatch: Batch, normalisers: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, dict[str, Metric]]:
        """The microbatch's share of the loss, and metrics over pairs, each with `<name>_by_source` [sources].

        `loss`; each term before its weight as `loss/<name>`; `rewards/chosen`, `rewards/rejected`,
        `rewards/margins`, `rewards/accuracies` (share of pairs whose chosen reward is larger);
        `log_probs/chosen`, `log_probs/rejected` (sums over an answer); `tokens/chosen`, `tokens/rejected`;
        and, with a reference, `kl`: KL(reference || policy) in nats an answer, as the mean over both answers
        of log ref - log pi (the k1 estimator: unbiased if the reference wrote them; it may be negative).

        Raises:
            ValueError: a loss needs the reference's log-probabilities, and the batch has none.
        """
        real = _is_pair(microbatch)
        pairs = self._pairs(model, microbatch, real)
        terms = {loss.name: jnp.sum(loss(pairs), axis=1, where=real) for loss in self.config.losses}
        shares = sum(
            (loss.weight / normalisers[loss.normaliser] * terms[loss.name] for loss in self.config.losses),
            start=jnp.zeros(real.shape[0], jnp.float32),
        )
        counts = {
            "pairs": jnp.sum(real.astype(jnp.float32), axis=1),
            "chosen_tokens": jnp.sum(pairs.chosen.tokens, axis=1, where=real),
        }
        rows = {"loss": (shares * normalisers["pairs"], counts["pairs"])}
        rows |= {f"loss/{x.name}": (terms[x.name], counts[x.normaliser]) for x in self.config.losses}
        for name, values in self._observed(pairs).items():
            rows[name] = (jnp.sum(values, axis=1, where=real), counts["pairs"])
        metrics = _with_sources(rows, microbatch["source"], self.num_sources)
        return jnp.sum(shares), jax.lax.stop_gradient(metrics)

    def _pairs(self, model: Gemma3, batch: Batch, real: Bool[Array, "B R"]) -> Pairs:
        """Sums over the answers; empty places hold anything, and pass no gradient on, not even one of nan."""
        log_probs = _answer_log_probs(model, batch)
        mask = batch["loss_mask"].astype(jnp.float32)

        def side(name: str) -> Answers:
            segments = batch[f"{name}_segment"]
            tokens = segment_sums(mask, batch["segment_ids"], segments)
            sums = segment_sums(log_probs, batch["segment_ids"], segments)
            return Answers(
                log_probs=jnp.where(real, sums, -1.0),
                tokens=jnp.maximum(tokens, 1.0),
                reference=_reference(batch, name) if self.config.needs_reference else None,
            )

        return Pairs(chosen=side("chosen"), rejected=side("rejected"))

    def _observed(self, pairs: Pairs) -> dict[str, PairValues]:
        """What is reported of each pair beside its losses."""
        chosen, rejected = self.config.rewarding.rewards(pairs)
        observed = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).astype(jnp.float32),
            "log_probs/chosen": pairs.chosen.log_probs,
            "log_probs/rejected": pairs.rejected.log_probs,
            "tokens/chosen": pairs.chosen.tokens,
            "tokens/rejected": pairs.rejected.tokens,
        }
        if pairs.chosen.reference is not None and pairs.rejected.reference is not None:
            drift = (side.reference - side.log_probs for side in pairs if side.reference is not None)
            observed["kl"] = sum(drift, start=jnp.zeros_like(chosen)) / 2
        return observed


def reference_log_probs(model: Gemma3, batch: Batch) -> dict[str, PairValues]:
    """The fields `reference_chosen` and `reference_rejected` of a batch, under this model; 0 in empty places.

    For the same rows and the same parameters they are what `Preference` computes of the policy: to be added
    to the batch at once, or stored for each pair.
    """
    real = _is_pair(batch)
    log_probs = _answer_log_probs(model, batch)
    return {
        f"reference_{name}": jnp.where(
            real, segment_sums(log_probs, batch["segment_ids"], batch[f"{name}_segment"]), 0.0
        )
        for name in ("chosen", "rejected")
    }


def segment_sums(
    values: Float[Array, "B T"], segment_ids: Int[Array, "B T"], segments: Int[Array, "B R"]
) -> PairValues:
    """The sum of a row's values over each of the segments named, in float32 and in a fixed order.

    One masked reduction, which XLA fuses: no array [B, R, T] is held, no product rounds as a matrix unit
    would, and nothing is scattered, which on a GPU adds up in another order every time.
    """
    inside = segment_ids[:, None, :] == segments[:, :, None]
    return jnp.sum(jnp.where(inside, values[:, None, :], 0.0), axis=-1)


def _answer_log_probs(model: Gemma3, batch: Batch) -> Float[Array, "B T"]:
    """Log-probabilities of the targets, 0 outside the answers."""
    hidden = model(batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"])
    log_probs = model.cross_entropy(hidden, batch["targets"]).log_probs
    return log_probs * batch["loss_mask"].astype(jnp.float32)


def _is_pair(batch: Batch) -> Bool[Array, "B R"]:
    return (batch["chosen_segment"] > 0) & (batch["rejected_segment"] > 0)


def _reference(batch: Batch, name: str) -> PairValues:
    if f"reference_{name}" not in batch:
        raise ValueError(
            f"the batch has no reference_{name}, which these losses need: add what reference_log_probs gives "
            "for the reference model, or choose losses without a reference"
        )
    return batch[f"reference_{name}"].astype(jnp.float32)


def _with_sources(
    rows: Mapping[str, tuple[jax.Array, jax.Array]], source: Int[Array, " B"], num_sources: int
) -> dict[str, Metric]:
    """Row-wise (total, weight) [B] summed over all rows, and over each source's as `<name>_by_source`."""

    def by_source(values: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(values, source, num_sources)

    metrics = {name: Metric(jnp.sum(total), jnp.sum(weight)) for name, (total, weight) in rows.items()}
    return metrics | {
        f"{name}{BY_SOURCE}": Metric(by_source(total), by_source(weight))
        for name, (total, weight) in rows.items()
    }
