"""Generation against the forward pass without a cache, alone against in a batch, and where it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sealion_jax.errors import UserError
from sealion_jax.generation.config import SamplingConfig
from sealion_jax.generation.generator import Generator, rounded_length
from sealion_jax.layout import layout_of
from sealion_jax.model.config import ComputeConfig, Gemma3Config
from sealion_jax.model.gemma3 import abstract_params, binder, parameter_axes
from sealion_jax.sharding import MeshConfig, make_mesh, param_shardings

V = 48
# Two blocks of two layers and a rest of one, so a local layer that is scanned over and one that is not.
TINY = Gemma3Config(
    vocab_size=V,
    num_layers=5,
    layers_per_block=2,
    model_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    feed_forward_dim=48,
    query_scale_dim=20,
    sliding_window_tokens=12,
    global_rope_factor=8.0,
    max_context_tokens=192,
)
COMPUTE = ComputeConfig(dtype="float32", remat="none")
NEW = 100
SEED = 0
LENGTHS = (1, 11, 12, 13, 40)
"""Of the prompts: below the window, at it, above it, and far above it."""
PROMPTS = [np.random.default_rng(n).integers(1, V, size=n).tolist() for n in LENGTHS]
LONG = np.random.default_rng(9).integers(1, V, size=188).tolist()
SAMPLED = SamplingConfig(temperature=1.0, top_k=20, seed=5)


@pytest.fixture(scope="module")
def params() -> Any:
    """Drawn with NumPy, attention peaked, so that every key that is seen or not changes what is written.

    The last norm's factors are of either sign: else a token is the likeliest to follow itself.
    """
    rng = np.random.default_rng(SEED)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        mean, spread = (-1.0, 1.0) if "final_norm" in name else (0.5, 0.3) if "scale" in name else (0.0, 0.2)
        return jnp.asarray(mean + spread * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(TINY))


def make_generator(
    sampling: SamplingConfig, *, mesh: Any = None, stop_ids: Sequence[int] = (), batch_size: int = 5
) -> Generator:
    mesh = make_mesh(MeshConfig(), jax.devices()[:1]) if mesh is None else mesh
    bind = binder(TINY, compute=COMPUTE, layout=layout_of(mesh))
    return Generator(
        bind, mesh, config=TINY, sampling=sampling, stop_ids=stop_ids, batch_size=batch_size, piece_tokens=16
    )


@pytest.fixture(scope="module")
def greedy() -> Generator:
    return make_generator(SamplingConfig())


@pytest.fixture(scope="module")
def sampled() -> Generator:
    return make_generator(SAMPLED)


@pytest.fixture(scope="module")
def written(greedy: Generator, params: Any) -> list[tuple[int, ...]]:
    """What follows each of the prompts."""
    return [completion.ids for completion in greedy.generate(params, PROMPTS, max_new_tokens=NEW)]


def test_greedy_equals_the_forward_pass_without_a_cache(params: Any, written: list[tuple[int, ...]]) -> None:
    """Each token is the likeliest after all before it, by dense attention over whole rows."""
    rows = np.zeros((len(PROMPTS), max(LENGTHS) + NEW), np.int32)
    for row, prompt, new in zip(rows, PROMPTS, written, strict=True):
        row[: len(prompt) + NEW] = [*prompt, *new]
    bind = binder(TINY, compute=ComputeConfig(dtype="float32", remat="none", attention="dense"))

    @jax.jit
    def logits_of(params: Any, tokens: jax.Array) -> jax.Array:
        model = bind(params)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return model.logits(model(tokens, positions=positions, segment_ids=jnp.ones_like(tokens)))

    logits = np.asarray(logits_of(params, rows))
    for row, length, new in zip(logits, LENGTHS, written, strict=True):
        before = row[length - 1 : length - 1 + NEW]
        np.testing.assert_array_equal(before.argmax(-1), new)
        second, best = np.sort(before, axis=-1)[:, -2:].T
        assert (best - second).min() > 3e-4  # rounding, 1e-5, cannot have decided
        assert len(set(new)) > 15  # nor are they a few tokens over and over, which would show little


def test_a_prompt_alone_is_answered_as_in_a_batch(
    greedy: Generator, params: Any, written: list[tuple[int, ...]]
) -> None:
    """In another row, beside none or others, and padded to another length: the first three fit 64 tokens."""
    alone = [greedy.generate(params, [prompt], max_new_tokens=NEW)[0].ids for prompt in PROMPTS[:3]]
    assert alone == written[:3]
    others = [PROMPTS[4][::-1], PROMPTS[1], PROMPTS[4]]
    assert greedy.generate(params, others, max_new_tokens=NEW)[1].ids == written[1]


def test_draws_do_not_depend_on_the_batch(sampled: Generator, params: Any) -> None:
    """A prompt's number goes with it: so a run that is interrupted goes on with the same answers."""
    numbers = list(range(len(PROMPTS)))
    together = sampled.generate(params, PROMPTS, max_new_tokens=NEW)
    order = [3, 0, 2]
    some = sampled.generate(
        params, [PROMPTS[n] for n in order], max_new_tokens=NEW, numbers=[numbers[n] for n in order]
    )
    assert [completion.ids for completion in some] == [together[n].ids for n in order]
    same_prompt = sampled.generate(params, [PROMPTS[4]] * 3, max_new_tokens=NEW)
    assert len({completion.ids for completion in same_prompt}) == 3
    # More prompts than fit one batch are the same as batch after batch.
    twice = sampled.generate(params, [*PROMPTS, *PROMPTS], max_new_tokens=NEW, numbers=[*numbers, *numbers])
    assert twice == [*together, *together]


def test_rows_end_at_their_stop_token_and_leave_the_others_alone(
    params: Any, written: list[tuple[int, ...]]
) -> None:
    """The last row writes the stop token in its first piece; the others at other times, or never."""

    def ends_at(stop: int) -> list[int]:
        return [row.index(stop) if stop in row else NEW for row in written]

    stop = next(
        token for token in written[4][3:16] if max(ends_at(token)) > 16 and len(set(ends_at(token))) > 2
    )
    ends = ends_at(stop)
    generator = make_generator(SamplingConfig(), stop_ids=(V + 7, stop))
    completions = generator.generate(params, PROMPTS, max_new_tokens=NEW)
    for completion, row, end in zip(completions, written, ends, strict=True):
        assert completion.ids == row[: end + 1]
        assert completion.stopped == ("end" if end < NEW else "length")
        assert completion.text_ids == row[:end]
    # Once every row has ended, no more pieces are computed: of the prompt's end, and of the first 16 tokens.
    pieces = list(generator.stream(params, [PROMPTS[4]], max_new_tokens=NEW))
    assert [len(new) for (new,) in pieces] == [1, ends[4]]


def test_no_more_tokens_than_asked_for(
    greedy: Generator, params: Any, written: list[tuple[int, ...]]
) -> None:
    """Around the end of a piece of 16; a long prompt has the shapes be those of the test below."""
    for count in (1, 2, 16, 17, 18):
        first, second = greedy.generate(params, [PROMPTS[1], LONG[:150]], max_new_tokens=count)
        assert first.ids == written[1][:count] and len(second.ids) == count
        assert (first.stopped, second.stopped) == ("length", "length")


def test_local_layers_keep_their_window_and_no_more(params: Any) -> None:
    """Shapes of the cache for 40 + 100 tokens, rounded up to 192: blocks stacked; in the compute dtype."""
    for dtype in ("float32", "bfloat16"):
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        generator = Generator(
            binder(TINY, compute=ComputeConfig(dtype=dtype, remat="none")),
            mesh,
            config=TINY,
            sampling=SamplingConfig(),
            stop_ids=(),
            batch_size=5,
        )
        batch = generator._batch(PROMPTS, range(5))
        state, _ = jax.eval_shape(
            lambda params, batch, of=generator: of._prefill_batch(params, batch, capacity=192), params, batch
        )
        after, tokens, _ = jax.eval_shape(generator._decode_piece, params, state, np.int32(3))
        assert tokens.shape == (5, 32)
        for cache in (state.cache, after.cache):
            assert [kept.keys.shape for kept in cache["blocks"]] == [(2, 5, 12, 2, 16), (2, 5, 192, 2, 16)]
            assert [kept.values.shape for kept in cache["rest"]] == [(5, 12, 2, 16)]
            assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype(dtype)}


def test_the_whole_context_can_be_filled(greedy: Generator, params: Any) -> None:
    """And what is written in its last places is what follows the prompt that is longer by the others."""
    (completion,) = greedy.generate(params, [LONG], max_new_tokens=4)
    assert len(completion.ids) == 4
    (last,) = greedy.generate(params, [[*LONG, *completion.ids[:3]]], max_new_tokens=1)
    assert last.ids == completion.ids[3:]
    with pytest.raises(UserError, match=r"188 tokens and 5 new ones .* context of 192 .* allow 4 new"):
        greedy.generate(params, [LONG], max_new_tokens=5)


def test_a_prompt_without_tokens_is_refused(greedy: Generator, params: Any) -> None:
    with pytest.raises(ValueError, match=r"at least a token, got lengths \[1, 0\]"):
        greedy.generate(params, [[3], []], max_new_tokens=4)


@pytest.mark.slow
def test_a_mesh_writes_the_same(sampled: Generator, params: Any) -> None:
    """Rows over data x fsdp, key-value heads over tensor; five prompts are padded to eight rows."""
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8")
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    placed = jax.device_put(params, param_shardings(params, parameter_axes(TINY), mesh))
    generator = make_generator(SAMPLED, mesh=mesh)
    assert generator.batch_size == 8
    expected = sampled.generate(params, PROMPTS, max_new_tokens=NEW)
    assert generator.generate(placed, PROMPTS, max_new_tokens=NEW) == expected
    batch = generator._batch(PROMPTS, range(5))
    state, _ = generator._prefill(placed, batch, capacity=192)
    for _ in range(2):
        for leaf in jax.tree.leaves(state.cache):
            rows, heads = leaf.shape[-4], leaf.shape[-2]
            assert leaf.sharding.shard_shape(leaf.shape)[-4:] == (rows // 4, leaf.shape[-3], heads // 2, 16)
        state, *_ = generator._decode(placed, state, np.int32(2))


def test_lengths_are_rounded_to_few_sizes() -> None:
    sizes = [rounded_length(length, 1000) for length in range(1, 1001)]
    assert sorted(set(sizes)) == [64, 96, 128, 192, 256, 384, 512, 768, 1000]
    assert all(size >= length for length, size in enumerate(sizes, start=1))
    assert all(size <= max(64, 1.5 * length) for length, size in enumerate(sizes, start=1))
