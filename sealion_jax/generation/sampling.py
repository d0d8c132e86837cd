"""Which token comes next: rules that take tokens out of the logits, and the draw among those that are left.

A token that is taken out gets a logit of minus infinity.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from sealion_jax.generation.config import SamplingConfig

Logits = Float[Array, "B V"]


def scale_by_temperature(logits: Logits, temperature: float) -> Logits:
    """Logits / temperature, up to a constant for each row: below 1 the likely tokens become likelier.

    Source: Ackley, Hinton and Sejnowski, "A Learning Algorithm for Boltzmann Machines" (1985).
    """
    # The largest becomes 0, so that a tiny temperature makes no infinity.
    return (logits - logits.max(-1, keepdims=True)) / temperature


def keep_top_k(logits: Logits, k: int) -> Logits:
    """The k largest logits of each row, and those equal to the smallest of them.

    Source: Fan, Lewis and Dauphin, "Hierarchical Neural Story Generation" (arXiv:1805.04833), section 5.1.
    """
    k = min(k, logits.shape[-1])
    smallest = jax.lax.top_k(logits, k)[0][:, -1:]
    return jnp.where(logits >= smallest, logits, -jnp.inf)


def keep_top_p(logits: Logits, p: float) -> Logits:
    """The fewest tokens, the most probable first, whose probabilities sum to p or more; and equal ones.

    Source: Holtzman et al., "The Curious Case of Neural Text Degeneration" (arXiv:1904.09751), section 3.1.
    """
    descending = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # The first is always kept, since nothing comes before it.
    smallest = jnp.min(jnp.where(before < p, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= smallest, logits, -jnp.inf)


def keep_min_p(logits: Logits, p: float) -> Logits:
    """The tokens that are at least p times as probable as the most probable one.

    Source: Nguyen et al., "Turning Up the Heat: Min-p Sampling" (arXiv:2407.01082), section 3.
    """
    return jnp.where(logits >= logits.max(-1, keepdims=True) + jnp.log(p), logits, -jnp.inf)


def filtered(logits: Logits, config: SamplingConfig) -> Logits:
    """The logits that are drawn from, in the order of the fields: Transformers' order too."""
    logits = scale_by_temperature(logits, config.temperature)
    if config.top_k is not None:
        logits = keep_top_k(logits, config.top_k)
    if config.top_p is not None:
        logits = keep_top_p(logits, config.top_p)
    if config.min_p is not None:
        logits = keep_min_p(logits, config.min_p)
    return logits


def row_keys(seed: int, numbers: Int[Array, " B"]) -> Key[Array, " B"]:
    """A key for each prompt, from the seed and the prompt's number alone."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), numbers)


def sample(
    logits: Logits, config: SamplingConfig, *, keys: Key[Array, " B"], positions: Int[Array, " B"]
) -> Int[Array, " B"]:
    """A token for each row, drawn from softmax(logits) after the rules, or the likeliest if greedy.

    The draw depends on nothing but the row's own logits, key and position: so neither on the rows beside it
    nor on what was generated before a run was interrupted.

    Args:
        positions: of the tokens that are drawn.
    """
    if config.temperature == 0:
        return jnp.argmax(logits, axis=-1)
    token_keys = jax.vmap(jax.random.fold_in)(keys, positions)
    return jax.vmap(jax.random.categorical)(token_keys, filtered(logits, config))
