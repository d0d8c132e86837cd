"""Next-token prediction, for continued pre-training and instruction tuning: only the mask differs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sealion_jax.checks import check_number
from sealion_jax.model.gemma3 import Gemma3
from sealion_jax.objectives.base import BY_SOURCE, Batch, Metric


@dataclass(frozen=True, kw_only=True)
class CausalLMConfig:
    """Predicting the next token: of texts every one, of chats those that `data.examples.learn` says."""

    z_loss: float = 0.0
    """Adds z_loss * (log of the sum of the exponentials of the logits)^2 to each token's loss, which keeps
    logits from drifting (PaLM, arXiv:2204.02311, section 5, takes 1e-4); not in the loss that is reported."""

    def __post_init__(self) -> None:
        check_number("objective.z_loss", self.z_loss, least=0)


@dataclass(frozen=True, kw_only=True)
class CausalLM:
    """Cross-entropy in nats, averaged over the learned tokens of the global batch.

    `loss_mask` may hold weights other than 0 and 1: then it is the weighted mean.
    """

    num_sources: int
    """Sources of the mixture: the loss is also reported for each."""
    z_loss: float = 0.0
    """As in CausalLMConfig."""

    def normalisers(self, batch: Batch) -> dict[str, jax.Array]:
        """`tokens`: the learned tokens of the global batch, by their weights; 1 where there are none."""
        tokens = jnp.sum(batch["loss_mask"].astype(jnp.float32))
        return {"tokens": jnp.where(tokens > 0, tokens, 1.0)}

    def loss(
        self, model: Gemma3, microbatch: Batch, normalisers: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, dict[str, Metric]]:
        """The microbatch's share of the mean loss; metrics `loss` [] and `loss_by_source` [sources]."""
        hidden = model(
            microbatch["tokens"], positions=microbatch["positions"], segment_ids=microbatch["segment_ids"]
        )
        mask = microbatch["loss_mask"].astype(jnp.float32)
        found = model.cross_entropy(
            hidden, microbatch["targets"], weights=mask / normalisers["tokens"], z_loss=self.z_loss
        )
        assert found.loss is not None
        nats, tokens = -jnp.sum(found.log_probs * mask, axis=1), jnp.sum(mask, axis=1)

        def by_source(rows: jax.Array) -> jax.Array:
            return jax.ops.segment_sum(rows, microbatch["source"], self.num_sources)

        metrics = {
            "loss": Metric(jnp.sum(nats), jnp.sum(tokens)),
            f"loss{BY_SOURCE}": Metric(by_source(nats), by_source(tokens)),
        }
        return found.loss, metrics
