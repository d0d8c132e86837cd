"""Chats and pairs scored in packed rows and strided windows, against all logits of each one alone."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import scipy.stats

from sealion_jax.evaluation.config import EvaluationConfig
from sealion_jax.evaluation.pairs import PairScores
from sealion_jax.evaluation.perplexity import EvaluationSet, Scorer, evaluate_sets, load_sets, score_pairs
from sealion_jax.layout import layout_of
from sealion_jax.model.config import ComputeConfig
from sealion_jax.model.gemma3 import abstract_params, binder
from sealion_jax.sharding import MeshConfig, make_mesh
from sealion_jax.tokenizer import Tokenizer
from tests.evaluation.conversations import (
    CHATS,
    PAIRS,
    Dense,
    assistant_spans,
    chat_tokens,
    given_turns,
    pair_tokens,
    said_bytes,
)
from tests.tiny_model import CONFIG
from tests.tiny_text import SENTENCES, tiny_tokenizer

CONTEXT = 48
MODEL = dataclasses.replace(CONFIG, vocab_size=704)
BIND = binder(MODEL, compute=ComputeConfig(dtype="float32", remat="none"))


class World(NamedTuple):
    """A tokenizer, a scorer, its parameters and a reference's, and the sets of `write_sets`."""

    tokenizer: Tokenizer
    scorer: Scorer
    params: Any
    reference: Any
    sets: dict[str, EvaluationSet]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def draw(seed: int) -> Any:
    """Parameters so large that every norm and attention matters."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(leaf.dtype), abstract_params(MODEL)
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    tokenizer, _ = tiny_tokenizer(folder)
    chats = [row for row, _ in CHATS]
    files = {
        "text": [{"text": text, "lang": language} for language, text in SENTENCES.items()],
        "chats": chats,
        "chats again": [*chats[::-1], *chats[3:5]],
        "one chat": chats[1:2],
        "pairs": PAIRS,
        "pairs again": PAIRS[::-1],
    }
    paths = {name: write_rows(folder / f"{name}.jsonl", rows) for name, rows in files.items()}
    mesh = make_mesh(MeshConfig())
    bind = binder(
        MODEL,
        compute=ComputeConfig(dtype="float32", remat="none"),
        layout=layout_of(mesh),
    )
    return World(
        tokenizer=tokenizer,
        scorer=Scorer(bind, mesh, batch_size=8, row_length=CONTEXT, eos_id=tokenizer.eos_id),
        params=draw(0),
        reference=draw(1),
        sets={one.name: one for one in load_sets(EvaluationConfig(sets=paths), tokenizer, context=CONTEXT)},
    )


@pytest.fixture(scope="module")
def dense() -> Dense:
    return Dense(BIND, context=CONTEXT)


def places(spans: Sequence[range]) -> list[int]:
    return [place for span in spans for place in span]


@pytest.fixture(scope="module")
def chat_truth(world: World, dense: Dense) -> list[tuple[float, int, int]]:
    """Nats, tokens and bytes of what the assistant says in each of CHATS."""
    found = []
    for (_, given), ids in zip(CHATS, chat_tokens(world.tokenizer), strict=True):
        spans = assistant_spans(ids, world.tokenizer)[given:]
        nats = dense.nats(world.params, ids, places(spans))
        found.append((nats, len(places(spans)), said_bytes(ids, spans, world.tokenizer)))
    return found


def pair_truth(world: World, dense: Dense, params: Any) -> np.ndarray:
    """[pairs, 4]: log-probability and tokens of the chosen answer, and of the rejected one."""
    found = []
    for row, pair in zip(PAIRS, pair_tokens(world.tokenizer), strict=True):
        numbers = []
        for ids in pair:
            where = places(assistant_spans(ids, world.tokenizer)[given_turns(row) :])
            numbers += [-dense.nats(params, ids, where), len(where)]
        found.append(numbers)
    return np.array(found)


def test_the_rows_are_of_every_length(world: World) -> None:
    """Some share a row, some are cut into many windows, of which some have nothing to score."""
    lengths = [len(ids) for ids in chat_tokens(world.tokenizer)]
    assert min(lengths) < CONTEXT // 2 and max(lengths) > 4 * CONTEXT
    chats = world.sets["chats"]
    assert any(len(row) > 1 for row in chats.rows)
    assert max(np.bincount([piece.document for piece in chats.pieces])) > 3
    # The long question of chat 4 has windows of its own, in which nothing is scored.
    assert sum(piece.document == 4 for piece in chats.pieces) <= 2 and lengths[4] > 3 * CONTEXT
    assert not any(piece.scored.sum() == 0 for piece in chats.pieces)


def test_chats_are_scored_as_each_alone(world: World, chat_truth: list[tuple[float, int, int]]) -> None:
    scores = world.scorer.score(world.params, world.sets["chats"])
    assert [(score.tokens, score.num_bytes) for score in scores] == [truth[1:] for truth in chat_truth]
    np.testing.assert_allclose(
        [score.nats for score in scores], [truth[0] for truth in chat_truth], rtol=2e-6
    )
    assert [score.eos_nats for score in scores] == [0.0] * len(CHATS)


def test_metrics_of_chats(world: World, chat_truth: list[tuple[float, int, int]]) -> None:
    numbers = evaluate_sets(world.scorer, world.params, [world.sets["chats"]])
    languages = [row.get("lang", "und") for row, _ in CHATS]
    expected = {}
    for group in ("chats", *(f"chats:{language}" for language in dict.fromkeys(languages))):
        members = [n for n, language in enumerate(languages) if group in ("chats", f"chats:{language}")]
        nats, tokens, size = np.array(chat_truth)[members].sum(axis=0)
        expected |= {
            f"eval/{group}/loss": nats / tokens,
            f"eval/{group}/perplexity": np.exp(nats / tokens),
            f"eval/{group}/bits_per_byte": nats / np.log(2) / size,
            f"eval/{group}/documents": len(members),
            f"eval/{group}/tokens": tokens,
            f"eval/{group}/bytes": size,
        }
    assert numbers == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize(("name", "order"), [("chats again", [6, 5, 4, 3, 2, 1, 0, 3, 4]), ("one chat", [1])])
def test_chats_do_not_depend_on_what_they_are_packed_with(world: World, name: str, order: list[int]) -> None:
    first = world.scorer.score(world.params, world.sets["chats"])
    again = world.scorer.score(world.params, world.sets[name])
    np.testing.assert_allclose([x.nats for x in again], [first[n].nats for n in order], rtol=2e-6)
    assert [x.tokens for x in again] == [first[n].tokens for n in order]


def test_pairs_are_scored_as_each_answer_alone(world: World, dense: Dense) -> None:
    for params in (world.params, world.reference):
        truth = pair_truth(world, dense, params)
        scores = score_pairs(world.scorer, params, world.sets["pairs"])
        again = score_pairs(world.scorer, params, world.sets["pairs again"])
        for n, name in enumerate(("chosen", "chosen_tokens", "rejected", "rejected_tokens")):
            np.testing.assert_allclose(getattr(scores, name), truth[:, n], rtol=2e-6, err_msg=name)
            np.testing.assert_allclose(getattr(again, name)[::-1], truth[:, n], rtol=2e-6, err_msg=name)
        assert scores.chosen.dtype == scores.rejected.dtype == np.float64
    with pytest.raises(ValueError, match="chats is a set of chats; expected one of pairs"):
        score_pairs(world.scorer, world.params, world.sets["chats"])


def test_metrics_of_pairs(world: World, dense: Dense) -> None:
    reference = score_pairs(world.scorer, world.reference, world.sets["pairs"])
    numbers = evaluate_sets(world.scorer, world.params, [world.sets["pairs"]], {"pairs": reference})
    policy, other = (pair_truth(world, dense, params) for params in (world.params, world.reference))
    expected = {}
    for group, members in (("pairs", range(6)), ("pairs:id", range(3)), ("pairs:vi", range(3, 6))):
        wins = token_wins = reward_wins = margin = 0.0
        for n in members:
            chosen, chosen_tokens, rejected, rejected_tokens = policy[n]
            wins += chosen > rejected
            token_wins += chosen / chosen_tokens > rejected / rejected_tokens
            reward = (chosen - other[n, 0]) - (rejected - other[n, 2])
            reward_wins += reward > 0
            margin += reward
        interval = scipy.stats.binomtest(int(reward_wins), len(members)).proportion_ci(method="wilson")
        expected |= {
            f"eval/{group}/pairs": len(members),
            f"eval/{group}/accuracy": wins / len(members),
            f"eval/{group}/accuracy_per_token": token_wins / len(members),
            f"eval/{group}/loss": -policy[members, 0].sum() / policy[members, 1].sum(),
            f"eval/{group}/tokens": policy[members, 1].sum(),
            f"eval/{group}/reward_accuracy": reward_wins / len(members),
            f"eval/{group}/reward_accuracy_low": interval.low,
            f"eval/{group}/reward_accuracy_high": interval.high,
            f"eval/{group}/reward_margin": margin / len(members),
        }
    assert numbers == pytest.approx(expected, rel=2e-5, abs=1e-9)
    # Both sides of each share are there, so that a sign would be seen.
    assert 0 < numbers["eval/pairs/accuracy"] < 1 and 0 < numbers["eval/pairs/reward_accuracy"] < 1
    assert numbers["eval/pairs/accuracy"] != numbers["eval/pairs/accuracy_per_token"]


def test_a_model_is_its_own_reference(world: World) -> None:
    itself = score_pairs(world.scorer, world.params, world.sets["pairs"])
    numbers = evaluate_sets(world.scorer, world.params, [world.sets["pairs"]], {"pairs": itself})
    assert numbers["eval/pairs/reward_accuracy"] == 0.5
    assert numbers["eval/pairs/reward_margin"] == 0.0


def test_sets_of_every_kind_share_one_compiled_function(world: World) -> None:
    names = ("text", "chats", "pairs")
    numbers = evaluate_sets(world.scorer, world.params, [world.sets[name] for name in names])
    of_set = {
        name: {key.split("/")[2] for key in numbers if key.startswith(f"eval/{name}/")} for name in names
    }
    documents = {"loss", "perplexity", "bits_per_byte", "documents", "tokens", "bytes"}
    pairs = {"pairs", "accuracy", "accuracy_per_token", "loss", "tokens"}
    assert of_set == {"text": documents, "chats": documents, "pairs": pairs}
    assert all(math.isfinite(value) for value in numbers.values())
    assert numbers["eval/text/bytes"] == sum(len(text.encode()) for text in SENTENCES.values())
    # One shape of batches for all of them.
    assert world.scorer._log_probs._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]


def test_a_reference_of_other_answers_is_refused(world: World) -> None:
    scores = score_pairs(world.scorer, world.params, world.sets["pairs"])
    other = PairScores(
        chosen=scores.chosen,
        rejected=scores.rejected,
        chosen_tokens=scores.chosen_tokens + 1,
        rejected_tokens=scores.rejected_tokens,
    )
    with pytest.raises(ValueError, match="the reference's chosen_tokens are not those of the 6 pairs"):
        evaluate_sets(world.scorer, world.params, [world.sets["pairs"]], {"pairs": other})
