"""Prompts as token ids to what the model writes after them: prefill, then decoding in pieces, under `jit`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int, Key

from sealion_jax.errors import UserError
from sealion_jax.generation.attention import over_cache, over_prompts
from sealion_jax.generation.cache import appended
from sealion_jax.generation.config import SamplingConfig
from sealion_jax.generation.sampling import row_keys, sample
from sealion_jax.model.config import Gemma3Config
from sealion_jax.model.gemma3 import Gemma3, Memory, Params
from sealion_jax.sharding import batch_devices, batch_sharding, process_rows, replicated, to_device

SMALLEST_LENGTH = 64
NOTHING = -1
"""In the place of a token: this row has ended before."""

Stopped = Literal["end", "length"]


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What a model wrote after a prompt."""

    ids: tuple[int, ...]
    """All new tokens, the one that ended it included."""
    stopped: Stopped
    """Why it ended: a stop token, or as many tokens as were allowed."""

    @property
    def text_ids(self) -> tuple[int, ...]:
        """The new tokens without the one that ended it."""
        return self.ids[:-1] if self.stopped == "end" else self.ids


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("cache", "tokens", "positions", "done", "keys"),
    meta_fields=(),
)
@dataclass(frozen=True, kw_only=True)
class State:
    """A batch in the midst of being generated."""

    cache: Memory
    """Keys and values of all tokens before the newest."""
    tokens: Int[Array, " B"]
    """The newest token of each row."""
    positions: Int[Array, " B"]
    """Theirs, from 0."""
    done: Bool[Array, " B"]
    keys: Key[Array, " B"]


def rounded_length(length: int, most: int) -> int:
    """The next of 64, 96, 128, 192, 256, 384, ..., at most `most`: few lengths, so few compilations."""
    size = SMALLEST_LENGTH
    while size < length:
        size = size // 2 * 3 if size & (size - 1) == 0 else size // 3 * 4
    return min(size, most)


class Generator:
    """Writes on after prompts, with a model on a mesh; compiled once for each rounded length."""

    def __init__(
        self,
        bind: Callable[[Params], Gemma3],
        mesh: Mesh,
        *,
        config: Gemma3Config,
        sampling: SamplingConfig,
        stop_ids: Sequence[int],
        batch_size: int,
        piece_tokens: int = 32,
    ) -> None:
        """
        Args:
            stop_ids: tokens after which a row has ended.
            batch_size: prompts at a time, rounded up to the devices.
            piece_tokens: tokens that are generated between two looks at them.
        """
        devices = batch_devices(mesh)
        self.config = config
        self.batch_size = -(-batch_size // devices) * devices
        self._bind = bind
        self._sampling = sampling
        self._stop_ids = tuple(stop_ids)
        self._piece = piece_tokens
        self._sharding = batch_sharding(mesh)
        self._rows = process_rows(self._sharding, self.batch_size)
        seen = replicated(mesh)
        self._prefill = jax.jit(self._prefill_batch, static_argnames="capacity", out_shardings=(None, seen))
        self._decode = jax.jit(self._decode_piece, donate_argnums=1, out_shardings=(None, seen, seen))

    def generate(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        numbers: Sequence[int] | None = None,
    ) -> list[Completion]:
        """What follows each prompt, in their order; `batch_size` prompts are computed at a time.

        Args:
            numbers: of the prompts, which their draws depend on; 0, 1, ... by themselves.

        Raises:
            UserError: a prompt and `max_new_tokens` exceed the model's context.
        """
        numbers = range(len(prompts)) if numbers is None else numbers
        completions: list[Completion] = []
        for first in range(0, len(prompts), self.batch_size):
            part = slice(first, first + self.batch_size)
            written: list[list[int]] = [[] for _ in prompts[part]]
            pieces = self.stream(params, prompts[part], max_new_tokens=max_new_tokens, numbers=numbers[part])
            for piece in pieces:
                for row, new in zip(written, piece, strict=True):
                    row.extend(new)
            completions += [self.completion(row) for row in written]
        return completions

    def completion(self, ids: Sequence[int]) -> Completion:
        """All tokens that were streamed for one prompt, with what they tell of how it ended."""
        ended = bool(ids) and ids[-1] in self._stop_ids
        return Completion(ids=tuple(ids), stopped="end" if ended else "length")

    def stream(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        numbers: Sequence[int] | None = None,
    ) -> Iterator[list[list[int]]]:
        """The new tokens of each of up to `batch_size` prompts, piece by piece; see `generate`."""
        batch = self._batch(prompts, range(len(prompts)) if numbers is None else numbers)
        longest = max(map(len, prompts))
        most = self.config.max_context_tokens
        if longest + max_new_tokens > most:
            raise UserError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones are more than the model's "
                f"context of {most} tokens; shorten the prompt, or allow {max(most - longest, 0)} new tokens"
            )
        capacity = rounded_length(longest + max_new_tokens, most)
        state, tokens = self._prefill(params, batch, capacity=capacity)
        yield _taken(np.asarray(tokens)[:, None], len(prompts))
        left, all_done = max_new_tokens - 1, False
        while left > 0 and not all_done:
            state, tokens, done = self._decode(params, state, np.int32(min(left, self._piece)))
            left -= self._piece
            yield _taken(np.asarray(tokens), len(prompts))
            all_done = bool(done)

    def _batch(self, prompts: Sequence[Sequence[int]], numbers: Sequence[int]) -> Mapping[str, Array]:
        """The prompts as padded rows on devices; rows without a prompt are done from the start."""
        if not 0 < len(prompts) <= self.batch_size or not all(map(len, prompts)):
            raise ValueError(
                f"expected 1 to {self.batch_size} prompts of at least a token, got lengths "
                f"{[len(prompt) for prompt in prompts]}"
            )
        B, T = self.batch_size, rounded_length(max(map(len, prompts)), self.config.max_context_tokens)
        tokens = np.zeros((B, T), np.int32)
        lengths, rows = np.ones(B, np.int32), np.zeros(B, np.int32)
        for b, (prompt, number) in enumerate(zip(prompts, numbers, strict=True)):
            tokens[b, : len(prompt)] = prompt
            lengths[b], rows[b] = len(prompt), number
        arrays = {"tokens": tokens, "lengths": lengths, "numbers": rows, "done": np.arange(B) >= len(prompts)}
        local = {name: array[self._rows] for name, array in arrays.items()}
        return to_device(local, self._rows, self._sharding, B)

    def _prefill_batch(
        self, params: Params, batch: Mapping[str, Array], *, capacity: int
    ) -> tuple[State, Int[Array, " B"]]:
        """The state after the prompts, and the first new token of each row."""
        model = self._bind(params)
        tokens, lengths = batch["tokens"], batch["lengths"]
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, cache = model.remember(
            tokens,
            positions=positions,
            segment_ids=(positions < lengths[:, None]).astype(jnp.int32),
            attend=over_prompts(lengths, capacity=capacity),
        )
        last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)
        keys = row_keys(self._sampling.seed, batch["numbers"])
        first = sample(model.logits(last)[:, 0], self._sampling, keys=keys, positions=lengths)
        state = State(cache=cache, tokens=first, positions=lengths, done=batch["done"], keys=keys)
        return self._with_ends(state), jnp.where(batch["done"], NOTHING, first)

    def _decode_piece(
        self, params: Params, state: State, steps: Int[Array, ""]
    ) -> tuple[State, Int[Array, "B piece"], Bool[Array, ""]]:
        """The state after up to `steps` more tokens, those tokens, and whether every row has ended."""
        model = self._bind(params)
        out = jnp.full((self._piece, len(state.tokens)), NOTHING, jnp.int32)

        def go_on(carry: tuple[Array, State, Array]) -> Array:
            step, state, _ = carry
            return (step < steps) & ~state.done.all()

        def decode(carry: tuple[Array, State, Array]) -> tuple[Array, State, Array]:
            step, state, out = carry
            new = self._next(model, state)
            return step + 1, new, out.at[step].set(jnp.where(state.done, NOTHING, new.tokens))

        _, state, out = jax.lax.while_loop(go_on, decode, (jnp.int32(0), state, out))
        return state, out.T, state.done.all()

    def _next(self, model: Gemma3, state: State) -> State:
        """The state with one more token in every row that has not ended; the others stay where they are."""
        hidden, new = model.remember(
            state.tokens[:, None],
            positions=state.positions[:, None],
            segment_ids=jnp.ones_like(state.tokens)[:, None],
            attend=over_cache(state.positions),
            memory=state.cache,
        )
        cache = appended(state.cache, new, state.positions, layout=model.layout)
        positions = state.positions + ~state.done
        tokens = sample(model.logits(hidden)[:, 0], self._sampling, keys=state.keys, positions=positions)
        tokens = jnp.where(state.done, state.tokens, tokens)
        return self._with_ends(replace(state, cache=cache, tokens=tokens, positions=positions))

    def _with_ends(self, state: State) -> State:
        """The state in which the rows whose newest token is a stop token are done."""
        ended = jnp.isin(state.tokens, jnp.asarray(self._stop_ids, jnp.int32))
        return replace(state, done=state.done | ended)


def _taken(tokens: Int[np.ndarray, "B piece"], count: int) -> list[list[int]]:
    """The tokens of the first `count` rows, each up to where it ended."""
    return [[int(token) for token in row if token != NOTHING] for row in tokens[:count]]
