"""The preference objective over packed rows: against answers alone in their rows, and NumPy's formulas."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding, PartitionSpec

from sealion_jax.layout import layout_of
from sealion_jax.model.config import ComputeConfig, Gemma3Config
from sealion_jax.model.gemma3 import abstract_params, binder, init_params
from sealion_jax.objectives.preference import Preference, reference_log_probs, segment_sums
from sealion_jax.objectives.preference_config import (
    OddsRatioLoss,
    PreferenceConfig,
    PreferenceLoss,
    SFTLoss,
    SigmoidLoss,
    SimPOLoss,
)
from sealion_jax.optimizer import OptimizerConfig, adamw, learning_rate_schedule
from sealion_jax.sharding import MeshConfig, batch_sharding, make_mesh
from sealion_jax.training.state import TrainState
from sealion_jax.training.step import loss_and_gradients, make_update
from tests.objectives.formulas import CASES, slopes
from tests.tiny_model import CONFIG

BIND = binder(CONFIG, compute=ComputeConfig(dtype="float32", remat="none"))
QUICK = {"xla_backend_optimization_level": 0}
SOURCES = 3
LENGTH, PLACES = 64, 3
# Which pairs are in which row: unequal numbers, a row of none, halves that differ.
ROWS = ((0, 1, 2), (3,), (), (4, 5), (6,), (7, 8, 9), (10,), (11,))
SOURCE_OF_ROW = np.array([0, 1, 2, 1, 0, 2, 2, 0], np.int32)
PAIRS = 12


def make_texts() -> tuple[list[tuple[np.ndarray, int]], np.ndarray]:
    """Answers with their prompts, as (tokens, prompt's tokens), chosen ones first; and their references."""
    rng = np.random.default_rng(0)
    texts: list[tuple[np.ndarray, int]] = [(np.zeros(0, np.int32), 0)] * (2 * PAIRS)
    for pair in range(PAIRS):
        prompt = rng.integers(4, 96, rng.integers(1, 5))
        for side in (0, 1):
            answer = rng.integers(4, 96, rng.integers(1, 7))
            texts[side * PAIRS + pair] = (np.concatenate((prompt, answer)).astype(np.int32), len(prompt))
    return texts, (-5 * rng.integers(1, 7, 2 * PAIRS) + rng.normal(0, 3, 2 * PAIRS)).astype(np.float32)


TEXTS, REFERENCE = make_texts()
ANSWER_TOKENS = np.array([len(tokens) - prompt for tokens, prompt in TEXTS], np.float64)
SOURCE = np.zeros(PAIRS, np.int32)
for number, members in enumerate(ROWS):
    SOURCE[list(members)] = SOURCE_OF_ROW[number]


def pack(rows: list[list[int]], length: int) -> dict[str, np.ndarray]:
    """Rows of segments, each one text, in the order given; targets where nothing is learned are arbitrary."""
    shape = (len(rows), length)
    batch: dict[str, np.ndarray] = {
        name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "segment_ids", "positions")
    }
    batch["targets"] += 7
    batch["loss_mask"] = np.zeros(shape, np.float32)
    for row, members in enumerate(rows):
        at = 0
        for segment, text in enumerate(members, start=1):
            tokens, prompt = TEXTS[text]
            part = np.s_[row, at : at + len(tokens)]
            batch["tokens"][part] = tokens
            batch["targets"][row, at : at + len(tokens) - 1] = tokens[1:]
            batch["segment_ids"][part] = segment
            batch["positions"][part] = np.arange(len(tokens))
            batch["loss_mask"][row, at + prompt - 1 : at + len(tokens) - 1] = 1
            at += len(tokens)
    return batch


def make_batch(rows: tuple[tuple[int, ...], ...] = ROWS) -> dict[str, np.ndarray]:
    """Pairs packed into rows, segments and places shuffled; references of empty places are not a number."""
    rng = np.random.default_rng(1)
    segments = [rng.permutation([*members, *(PAIRS + pair for pair in members)]).tolist() for members in rows]
    batch = pack(segments, LENGTH)
    for side in ("chosen", "rejected"):
        batch[f"{side}_segment"] = np.zeros((len(rows), PLACES), np.int32)
        batch[f"reference_{side}"] = np.full((len(rows), PLACES), np.nan, np.float32)
    for row, members in enumerate(rows):
        places = rng.permutation(PLACES)[: len(members)]
        for place, pair in zip(places, members, strict=True):
            for side, text in (("chosen", pair), ("rejected", PAIRS + pair)):
                batch[f"{side}_segment"][row, place] = segments[row].index(text) + 1
                batch[f"reference_{side}"][row, place] = REFERENCE[text]
    batch["source"] = SOURCE_OF_ROW
    return batch


def places_of(batch: dict[str, np.ndarray]) -> dict[int, tuple[int, int]]:
    """Where each pair is in a batch of `make_batch`, known by its reference."""
    found = {}
    for row, place in np.argwhere(batch["chosen_segment"] > 0):
        pair = np.flatnonzero(REFERENCE[:PAIRS] == batch["reference_chosen"][row, place])
        found[int(pair[0])] = (int(row), int(place))
    return found


def objective(*losses: PreferenceLoss) -> Preference:
    return Preference(config=PreferenceConfig(losses=losses), num_sources=SOURCES)


# Each loss alone, the odds ratio and SFT as ORPO has them; and many at once.
OBJECTIVES = {name: objective(loss) for name, (loss, _) in CASES.items() if name != "sft"}
OBJECTIVES["orpo"] = objective(SFTLoss(), OddsRatioLoss(weight=0.1))
MANY = objective(SFTLoss(weight=0.3), SigmoidLoss(beta=0.1, weight=0.8), SimPOLoss(weight=0.5))
OBJECTIVES["many"] = MANY
TERMS = {
    **{name: [(1.0, name)] for name in CASES},
    "odds_ratio": [(0.1, "odds_ratio")],
    "orpo": [(1.0, "sft"), (0.1, "odds_ratio")],
    "many": [(0.3, "sft"), (0.8, "sigmoid"), (0.5, "simpo of the paper")],
}


@pytest.fixture(scope="module")
def params() -> Any:
    return init_params(jax.random.key(0), CONFIG)


class Once:
    """A model whose hidden states are computed once, however many losses ask for them."""

    def __init__(self, model: Any) -> None:
        self._model, self._hidden = model, None
        self.cross_entropy = model.cross_entropy

    def __call__(self, tokens: Any, **options: Any) -> Any:
        if self._hidden is None:
            self._hidden = self._model(tokens, **options)
        return self._hidden


@pytest.fixture(scope="module")
def packed(params: Any) -> tuple[np.ndarray, Any, dict[str, Any]]:
    """Of packed rows: every objective's loss [objectives], its gradients, its metrics."""
    batch = make_batch()

    def losses(params: Any) -> tuple[jax.Array, dict[str, Any]]:
        model: Any = Once(BIND(params))
        found = {name: one.loss(model, batch, one.normalisers(batch)) for name, one in OBJECTIVES.items()}
        return jnp.stack([loss for loss, _ in found.values()]), {
            n: metrics for n, (_, metrics) in found.items()
        }

    def run(params: Any) -> Any:
        values, vjp, metrics = jax.vjp(losses, params, has_aux=True)
        (gradients,) = jax.lax.map(vjp, jnp.eye(len(OBJECTIVES)))
        return values, gradients, metrics

    return jax.tree.map(np.asarray, jax.jit(run, compiler_options=QUICK)(params))


@pytest.fixture(scope="module")
def alone(params: Any) -> tuple[np.ndarray, Any]:
    """Of each answer alone in its row, over all logits: its log-probability, float64, and its gradients."""
    batch = pack([[text] for text in range(2 * PAIRS)], 12)

    def sums(params: Any) -> jax.Array:
        model = BIND(params)
        hidden = model(batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"])
        log_probs = jax.nn.log_softmax(model.logits(hidden))
        picked = jnp.take_along_axis(log_probs, batch["targets"][..., None], -1)[..., 0]
        return jnp.sum(picked * batch["loss_mask"], axis=1)

    def run(params: Any) -> Any:
        values, vjp = jax.vjp(sums, params)
        return values, jax.lax.map(lambda row: vjp(row)[0], jnp.eye(2 * PAIRS))

    values, jacobian = jax.jit(run, compiler_options=QUICK)(params)
    return np.asarray(values, np.float64), jax.tree.map(lambda x: np.asarray(x, np.float64), jacobian)


@pytest.fixture(scope="module")
def evaluate() -> Any:
    """A function of (parameters, batch): the loss of many terms, DPO's with its metrics, and references."""
    dpo = objective(SigmoidLoss(beta=0.1))

    def run(params: Any, batch: Any) -> dict[str, Any]:
        model: Any = Once(BIND(params))
        return {
            "many": MANY.loss(model, batch, MANY.normalisers(batch))[0],
            "dpo": dpo.loss(model, batch, dpo.normalisers(batch)),
            "references": reference_log_probs(model, batch),
        }

    return jax.jit(run, compiler_options=QUICK)


FORMULAS = {name: formula for name, (_, formula) in CASES.items()}
FORMULAS["simpo of the paper"] = lambda c, r, rc, rr, nc, nr: np.logaddexp(0, -(2 * (c / nc - r / nr) - 1))


def numbers_of(sums: np.ndarray) -> list[np.ndarray]:
    """What formulas take, of all pairs."""
    both = (sums, REFERENCE.astype(np.float64), ANSWER_TOKENS)
    return [half for values in both for half in (values[:PAIRS], values[PAIRS:])]


def denominator(term: str) -> float:
    return ANSWER_TOKENS[:PAIRS].sum() if term == "sft" else PAIRS


@pytest.mark.parametrize("name", OBJECTIVES)
def test_packed_equals_unpacked_in_loss_and_gradients(name: str, packed: Any, alone: Any) -> None:
    values, gradients, _ = packed
    sums, jacobian = alone
    which = list(OBJECTIVES).index(name)
    numbers = numbers_of(sums)
    expected = sum(
        weight * FORMULAS[term](*numbers).sum() / denominator(term) for weight, term in TERMS[name]
    )
    assert values[which] == pytest.approx(expected, rel=1e-5)
    by_answer = sum(
        weight * np.concatenate(slopes(FORMULAS[term], numbers)) / denominator(term)
        for weight, term in TERMS[name]
    )
    for found, rows in zip(jax.tree.leaves(gradients), jax.tree.leaves(jacobian), strict=True):
        wanted = np.tensordot(by_answer, rows, 1)
        assert np.abs(found[which] - wanted).max() < 1e-5 * np.abs(wanted).max() + 1e-8


def test_metrics_equal_those_of_answers_alone(packed: Any, alone: Any) -> None:
    """In all and by source, with the denominators that they say."""
    metrics = packed[2]["many"]
    c, r, rc, rr, nc, nr = numbers_of(alone[0])
    numbers = (c, r, rc, rr, nc, nr)
    one = np.ones(PAIRS)
    terms = {
        "sft": (FORMULAS["sft"](*numbers), nc),
        "sigmoid": (FORMULAS["sigmoid"](*numbers), one),
        "simpo": (FORMULAS["simpo of the paper"](*numbers), one),
    }
    share = 0.3 * terms["sft"][0] * PAIRS / nc.sum() + 0.8 * terms["sigmoid"][0] + 0.5 * terms["simpo"][0]
    chosen, rejected = 0.1 * (c - rc), 0.1 * (r - rr)
    expected = {f"loss/{name}": term for name, term in terms.items()} | {
        "loss": (share, one),
        "rewards/chosen": (chosen, one),
        "rewards/rejected": (rejected, one),
        "rewards/margins": (chosen - rejected, one),
        "rewards/accuracies": (1.0 * (chosen > rejected), one),
        "log_probs/chosen": (c, one),
        "log_probs/rejected": (r, one),
        "tokens/chosen": (nc, one),
        "tokens/rejected": (nr, one),
        "kl": (((rc - c) + (rr - r)) / 2, one),
    }
    assert set(metrics) == {*expected, *(f"{name}_by_source" for name in expected)}
    assert 0 < expected["rewards/accuracies"][0].sum() < PAIRS
    for name, (totals, weights) in expected.items():
        np.testing.assert_allclose(metrics[name], (totals.sum(), weights.sum()), rtol=1e-5, err_msg=name)
        by_source = [np.bincount(SOURCE, values, SOURCES) for values in (totals, weights)]
        found = metrics[f"{name}_by_source"]
        np.testing.assert_allclose(found, by_source, rtol=1e-5, atol=1e-5, err_msg=name)
    total, weight = metrics["loss"]
    assert total / weight == pytest.approx(packed[0][list(OBJECTIVES).index("many")], rel=1e-6)


def test_microbatches_equal_one_batch_with_unequal_pairs(params: Any, packed: Any, evaluate: Any) -> None:
    batch, which = make_batch(), list(OBJECTIVES).index("many")
    loss, gradients, metrics = jax.jit(
        partial(loss_and_gradients, MANY, BIND, batch=batch, microbatches=4), compiler_options=QUICK
    )(params)
    assert float(loss) == pytest.approx(float(packed[0][which]), rel=1e-6)
    for a, b in zip(jax.tree.leaves(packed[1]), jax.tree.leaves(gradients), strict=True):
        assert np.abs(a[which] - b).max() < 1e-5 * np.abs(b).max() + 1e-8
    for name, found in metrics.items():
        np.testing.assert_allclose(found, packed[2]["many"][name], rtol=1e-5, atol=1e-5, err_msg=name)
    # A mean of the microbatches' means is another number: their pairs and tokens differ.
    parts = []
    for first in range(4):
        held = np.isin(np.arange(len(ROWS)), (first, first + 4))[:, None]
        parts.append(evaluate(params, {**batch, "chosen_segment": batch["chosen_segment"] * held})["many"])
    assert abs(np.mean(parts) - float(loss)) > 1e-3


def test_normalisers_count_pairs_and_chosen_tokens() -> None:
    batch = make_batch()
    assert {name: float(value) for name, value in MANY.normalisers(batch).items()} == {
        "pairs": PAIRS,
        "chosen_tokens": ANSWER_TOKENS[:PAIRS].sum(),
    }
    empty = {**batch, "chosen_segment": np.zeros_like(batch["chosen_segment"])}
    assert {float(value) for value in MANY.normalisers(empty).values()} == {1.0}


def test_first_dpo_loss_is_log_two_with_cached_references(params: Any, alone: Any, evaluate: Any) -> None:
    """Cached from the same rows, and from rows packed otherwise; they equal what answers alone give."""
    packings = [make_batch(), make_batch(((11, 10), (9,), (8, 7), (6,), (5, 4), (3,), (2, 1), (0,)))]
    for cached in packings:
        references = {name: np.asarray(x) for name, x in evaluate(params, cached)["references"].items()}
        assert all(np.all(x[cached["chosen_segment"] == 0] == 0) for x in references.values())
        by_pair = {
            side: {pair: references[f"reference_{side}"][place] for pair, place in places_of(cached).items()}
            for side in ("chosen", "rejected")
        }
        for side, sums in (("chosen", alone[0][:PAIRS]), ("rejected", alone[0][PAIRS:])):
            np.testing.assert_allclose([by_pair[side][pair] for pair in range(PAIRS)], sums, rtol=1e-5)
        batch = make_batch()
        for pair, place in places_of(batch).items():
            for side, values in by_pair.items():
                batch[f"reference_{side}"][place] = values[pair]
        loss, metrics = evaluate(params, batch)["dpo"]
        assert float(loss) == pytest.approx(np.log(2), abs=1e-6)
        assert abs(float(metrics["rewards/margins"].total)) < 1e-5
        assert abs(float(metrics["kl"].total)) < 1e-4


def test_gradient_agrees_with_finite_differences(params: Any, packed: Any, evaluate: Any) -> None:
    """Along the gradient, through model, packing and losses, in float32."""
    batch = make_batch()
    gradient = jax.tree.map(lambda rows: rows[list(OBJECTIVES).index("many")], packed[1])
    norm = np.sqrt(sum(float(np.vdot(g, g)) for g in jax.tree.leaves(gradient)))

    def moved(distance: float) -> float:
        there = jax.tree.map(lambda p, g: p + np.float32(distance / norm) * g, params, gradient)
        return float(evaluate(there, batch)["many"])

    slope = (8 * (moved(0.01) - moved(-0.01)) - (moved(0.02) - moved(-0.02))) / 0.12
    assert slope == pytest.approx(norm, rel=1e-3)


def test_an_answer_with_nothing_to_learn_is_finite(params: Any, evaluate: Any) -> None:
    batch = make_batch()
    nothing = {**batch, "loss_mask": batch["loss_mask"] * (np.arange(len(ROWS)) > 0)[:, None]}
    found = evaluate(params, nothing)
    assert np.isfinite(float(found["many"])) and np.isfinite(float(found["dpo"][0]))


def test_losses_without_a_reference_take_batches_without_one(params: Any) -> None:
    batch = {name: array for name, array in make_batch().items() if not name.startswith("reference")}
    free = objective(SFTLoss(), SimPOLoss())
    _, metrics = jax.eval_shape(lambda p: free.loss(BIND(p), batch, free.normalisers(batch)), params)
    assert "rewards/margins" in metrics and "kl" not in metrics
    with pytest.raises(ValueError, match="no reference_chosen"):
        jax.eval_shape(lambda p: MANY.loss(BIND(p), batch, MANY.normalisers(batch)), params)


def test_metrics_leave_the_steps_own_numbers_alone(params: Any) -> None:
    optimizer = OptimizerConfig()
    transform = adamw(optimizer)
    update = make_update(
        MANY,
        BIND,
        transform,
        schedule=learning_rate_schedule(optimizer.schedule, 10),
        max_grad_norm=1.0,
        microbatches=1,
    )
    state = TrainState(params=params, optimizer=transform.init(params))
    metrics = jax.eval_shape(update, state, np.int32(0), make_batch())[1]
    assert metrics["tokens"].shape == () and metrics["tokens"].dtype == jnp.int32
    assert metrics["loss/sigmoid"].total.shape == ()
    assert metrics["loss/sigmoid_by_source"].total.shape == (SOURCES,)


def test_a_mesh_gives_the_same(params: Any, packed: Any) -> None:
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2), jax.devices()[:8])
    bind = binder(CONFIG, compute=ComputeConfig(dtype="float32", remat="none"), layout=layout_of(mesh))
    everywhere = NamedSharding(mesh, PartitionSpec())
    step = jax.jit(
        lambda p, batch: MANY.loss(bind(p), batch, MANY.normalisers(batch)),
        in_shardings=(everywhere, batch_sharding(mesh)),
        compiler_options=QUICK,
    )
    loss, metrics = step(params, make_batch())
    assert float(loss) == pytest.approx(float(packed[0][list(OBJECTIVES).index("many")]), rel=1e-5)
    for name, found in metrics.items():
        np.testing.assert_allclose(found, packed[2]["many"][name], rtol=1e-4, atol=1e-4, err_msg=name)


def largest(jaxpr: Any) -> int:
    """Elements of the largest value of a jaxpr and of those inside it."""
    sizes = [variable.aval.size for equation in jaxpr.eqns for variable in equation.outvars]
    inner = [largest(sub) for equation in jaxpr.eqns for sub in jaxprs_in_params(equation.params)]
    return max([*sizes, *inner], default=0)


def test_logits_are_never_all_held() -> None:
    vocab = 8192
    big = Gemma3Config(**{**vars(CONFIG), "vocab_size": vocab})
    batch = make_batch()
    tokens = batch["tokens"].size
    compute = ComputeConfig(dtype="float32", remat="none", logits_bytes_per_device=tokens * vocab * 4 // 16)
    bind = binder(big, compute=compute)
    traced = jax.make_jaxpr(jax.grad(lambda p: MANY.loss(bind(p), batch, MANY.normalisers(batch))[0]))(
        abstract_params(big)
    )
    assert largest(traced.jaxpr) < tokens * vocab // 4


def test_segment_sums_over_named_segments() -> None:
    values = jnp.array([[1.0, 2, 4, 8, 16], [32, 64, 128, 256, 512]])
    segment_ids = jnp.array([[1, 1, 2, 3, 0], [1, 2, 2, 2, 5]])
    segments = jnp.array([[3, 1, 4], [2, 5, 1]])
    np.testing.assert_array_equal(segment_sums(values, segment_ids, segments), [[8, 3, 0], [448, 512, 32]])
