"""What every objective offers to the training step.

A loss is a sum of terms, each divided by a denominator of the whole global batch: tokens for cross-entropy,
pairs for preferences. The denominators are taken before the batch is cut into microbatches, so that each
microbatch's loss is its share of the batch's and the shares add up, whatever each of them holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import jax

from sealion_jax.model.gemma3 import Gemma3

Batch = Mapping[str, jax.Array]

BY_SOURCE = "_by_source"
"""Ends the name of a metric that has an element for each source of the mixture."""


class Metric(NamedTuple):
    """A mean kept as its parts, so that parts of several microbatches or processes add up; elementwise."""

    total: jax.Array
    weight: jax.Array


class Objective(Protocol):
    """A loss over batches; stateless."""

    def normalisers(self, batch: Batch) -> dict[str, jax.Array]:
        """The denominator of each term, from the whole global batch."""
        ...

    def loss(
        self, model: Gemma3, microbatch: Batch, normalisers: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, dict[str, Metric]]:
        """This microbatch's share of the batch's loss, already divided, and its metrics."""
        ...
