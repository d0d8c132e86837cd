"""Chats and pairs packed by `PackedExamples` against the same ones in rows of their own: losses, metrics,
gradients, and the reference's log-probabilities."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sealion_jax.data.chat.rows import chat_from_fields, preference_from_fields
from sealion_jax.data.packing.examples import PackedExamples
from sealion_jax.data.packing.rows import Row
from sealion_jax.data.store.references import Kept
from sealion_jax.data.store.token_store import TokenStore
from sealion_jax.data.store.writer import write_chat_store
from sealion_jax.model.config import ComputeConfig
from sealion_jax.model.gemma3 import binder, init_params
from sealion_jax.objectives.base import BY_SOURCE, Metric, Objective
from sealion_jax.objectives.causal_lm import CausalLM
from sealion_jax.objectives.preference import Preference
from sealion_jax.objectives.preference_config import PreferenceConfig, PreferenceLoss
from sealion_jax.sharding import MeshConfig, make_mesh
from sealion_jax.tokenizer import Tokenizer, train_tokenizer
from sealion_jax.training.references import ReferenceModel, compute_references
from sealion_jax.training.step import loss_and_gradients
from tests.objectives.formulas import CASES
from tests.tiny_chats import chat_row, pair_row
from tests.tiny_model import CONFIG
from tests.tiny_run import TEXT

LENGTH = 160
MODEL = dataclasses.replace(CONFIG, vocab_size=600)
BIND = binder(MODEL, compute=ComputeConfig(dtype="float32", remat="none"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    return train_tokenizer([TEXT] * 20, vocab_size=600, path=path)


@pytest.fixture(scope="module")
def params() -> Any:
    return init_params(jax.random.key(0), MODEL)


def store(folder: Path, kind: str, tokenizer: Tokenizer) -> TokenStore:
    rng = np.random.default_rng(5)
    if kind == "chats":
        examples = [chat_from_fields(chat_row(rng)) for _ in range(9)]
    else:
        examples = [preference_from_fields(pair_row(rng)) for _ in range(9)]
    write_chat_store(folder / kind, examples, tokenizer=tokenizer)
    return TokenStore.open(folder / kind)


def batch_of(rows: list[Row]) -> dict[str, jax.Array]:
    rows = [{**row, "source": np.int32(k % 2)} for k, row in enumerate(rows)]
    return {name: jnp.asarray(np.stack([row[name] for row in rows])) for name in rows[0]}


def alone(row: Row, segments: list[int]) -> Row:
    """A row of only some of the segments of a row, moved to its beginning, numbered anew."""
    names = ("tokens", "targets", "loss_mask", "positions", "segment_ids")
    new = {name: np.zeros_like(row[name]) for name in names}
    start = 0
    for number, segment in enumerate(segments, 1):
        where = row["segment_ids"] == segment
        stop = start + int(where.sum())
        for name in names:
            new[name][start:stop] = number if name == "segment_ids" else row[name][where]
        start = stop
    return new


def rows_of_chats(packed: PackedExamples) -> tuple[list[Row], list[Row]]:
    rows = [packed.row(window) for window in range(len(packed))]
    return rows, [alone(row, [s]) for row in rows for s in range(1, int(row["segment_ids"].max()) + 1)]


def rows_of_pairs(packed: PackedExamples) -> tuple[list[Row], list[Row]]:
    rows = [packed.row(window) for window in range(len(packed))]
    single = []
    for row in rows:
        for place in np.flatnonzero(row["chosen_segment"]).tolist():
            new = alone(row, [int(row[f"{name}_segment"][place]) for name in ("chosen", "rejected")])
            for side, name in enumerate(("chosen", "rejected")):
                new[f"{name}_segment"] = np.array([side + 1], np.int32)
                new[f"reference_{name}"] = row[f"reference_{name}"][[place]]
            single.append(new)
    return rows, single


def assert_equal_learning(objective: Objective, params: Any, packed: list[Row], single: list[Row]) -> None:
    assert len(single) > len(packed)
    one, many = (
        jax.jit(lambda p, b: loss_and_gradients(objective, BIND, p, b, microbatches=1))(
            params, batch_of(rows)
        )
        for rows in (packed, single)
    )
    np.testing.assert_allclose(one[0], many[0], rtol=2e-6)
    for name, metric in one[2].items():
        if not name.endswith(BY_SOURCE):  # rows of their own are given to sources anew
            other: Metric = many[2][name]
            np.testing.assert_allclose(metric.total, other.total, rtol=1e-5, atol=1e-5, err_msg=name)
            np.testing.assert_allclose(metric.weight, other.weight, err_msg=name)
    # In float32 a gradient is right to about a hundred-thousandth of its largest element.
    for ours, theirs in zip(jax.tree.leaves(one[1]), jax.tree.leaves(many[1]), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * float(jnp.abs(theirs).max()) + 1e-9)


def test_packed_chats_learn_as_chats_in_rows_of_their_own(tokenizer, params, tmp_path):
    packed = PackedExamples(store(tmp_path, "chats", tokenizer), LENGTH)
    assert_equal_learning(CausalLM(num_sources=2), params, *rows_of_chats(packed))


def test_a_weight_of_a_source_weighs_its_tokens(tokenizer, params, tmp_path):
    """The loss is the mean of -log p over tokens that count 1 and, of source 1, 2.5."""
    packed = PackedExamples(store(tmp_path, "chats", tokenizer), LENGTH)
    rows, _ = rows_of_chats(packed)
    plain = batch_of(rows)
    factors = np.where(np.asarray(plain["source"]) == 1, 2.5, 1.0).astype(np.float32)
    weighted = {**plain, "loss_mask": plain["loss_mask"] * factors[:, None]}
    objective = CausalLM(num_sources=2)
    _, metrics = objective.loss(BIND(params), plain, objective.normalisers(plain))
    loss, weighed = objective.loss(BIND(params), weighted, objective.normalisers(weighted))
    nats, tokens = (np.asarray(part, np.float64) for part in metrics["loss_by_source"])
    np.testing.assert_allclose(loss, (nats @ [1, 2.5]) / (tokens @ [1, 2.5]), rtol=1e-6)
    for name in ("total", "weight"):
        expected = np.asarray(getattr(metrics["loss_by_source"], name)) * [1, 2.5]
        np.testing.assert_allclose(getattr(weighed["loss_by_source"], name), expected, rtol=1e-6)


@pytest.fixture(scope="module")
def pairs(tokenizer, params, tmp_path_factory) -> PackedExamples:
    """With references that were computed for the cache, of another model than the policy."""
    packed = PackedExamples(store(tmp_path_factory.mktemp("pairs"), "pairs", tokenizer), LENGTH)
    mesh = make_mesh(MeshConfig(data=1, fsdp=1), devices=jax.devices()[:1])
    other = init_params(jax.random.key(1), MODEL)
    kept: list[Kept] = []
    values = compute_references(
        ReferenceModel(BIND, other, mesh, batch_size=2),
        packed,
        None,
        keep=kept.append,
        on_rows=lambda count: None,
        is_stopped=lambda: False,
    )
    assert values is not None and kept[-1].rows_done == len(packed)
    return packed.with_pairs(references=values)


def test_references_are_gone_on_with_and_a_stop_is_asked_for_only_where_it_can_be_heeded(pairs, params):
    """Stopped after each batch in turn, what is kept by then is the beginning of the whole."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=1), devices=jax.devices()[:1])
    model = ReferenceModel(BIND, init_params(jax.random.key(1), MODEL), mesh, batch_size=2)
    batches = -(-len(pairs) // 2)
    assert batches > 1

    def compute(found: Kept | None, kept: list[Kept], answers: list[bool]) -> np.ndarray | None:
        return compute_references(
            model,
            pairs,
            found,
            keep=kept.append,
            on_rows=lambda count: None,
            is_stopped=lambda: answers.pop(0),
        )

    found, values = None, None
    for batch in range(batches):
        kept: list[Kept] = []
        values = compute(found, kept, [True])
        found = kept[-1]
        assert found.rows_done == min(2 * (batch + 1), len(pairs))
        assert (values is None) == (batch + 1 < batches)
    np.testing.assert_array_equal(values, pairs.references)
    unasked = [False] * (batches - 1)
    np.testing.assert_array_equal(compute(None, [], unasked), pairs.references)
    assert unasked == []  # after the last batch there is nothing to stop


def test_cached_references_are_those_of_each_answer_alone(pairs: PackedExamples):
    bind_other = BIND(init_params(jax.random.key(1), MODEL))
    assert pairs.references is not None
    log_softmax = jax.jit(
        lambda tokens, positions, segments: jax.nn.log_softmax(
            bind_other.logits(bind_other(tokens, positions=positions, segment_ids=segments))[0]
        )
    )
    for document in range(pairs.store.num_documents):
        ids, learned = pairs.store.document_with_mask(document)
        row = np.zeros((3, 1, LENGTH), np.int32)
        row[:, 0, : len(ids)] = np.stack([ids, np.arange(len(ids)), np.ones(len(ids))])
        log_probs = np.asarray(log_softmax(*row), np.float64)
        expected = sum(log_probs[k - 1, ids[k]] for k in np.flatnonzero(learned))
        np.testing.assert_allclose(pairs.references[document], expected, rtol=1e-5)


def groups() -> list[tuple[PreferenceLoss, ...]]:
    """All cases, in as few sums as can hold them with each kind at most once."""
    groups: list[list[PreferenceLoss]] = []
    for loss, _ in CASES.values():
        free = next((group for group in groups if loss.name not in {other.name for other in group}), None)
        if free is None:
            groups.append(free := [])
        free.append(loss)
    return [tuple(group) for group in groups]


@pytest.mark.parametrize("losses", groups(), ids=lambda losses: "+".join(loss.name for loss in losses))
def test_packed_pairs_learn_as_pairs_in_rows_of_their_own(
    losses: tuple[PreferenceLoss, ...], pairs: PackedExamples, params
):
    """Each term by itself, in the metrics, and the gradient of their sum."""
    objective = Preference(config=PreferenceConfig(losses=losses), num_sources=2)
    assert_equal_learning(objective, params, *rows_of_pairs(pairs))
