"""The command on texts, chats and pairs, with a reference of other shapes; and what a reference must be."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from sealion_jax import cli, evaluate
from sealion_jax.checkpoint.weights import open_weights
from sealion_jax.evaluation.report import tables
from sealion_jax.model.config import ComputeConfig
from sealion_jax.model.gemma3 import abstract_params, binder
from sealion_jax.tokenizer import train_tokenizer
from tests.checkpoint.hf_models import TEXT_VERSION_4, random_tensors, text_shapes, write_directory
from tests.evaluation.conversations import (
    CHATS,
    PAIRS,
    Dense,
    assistant_spans,
    chat_tokens,
    given_turns,
    pair_tokens,
)
from tests.tiny_text import SENTENCES, tiny_tokenizer

CONTEXT = 48


def write_model(folder: Path, *, layers: int, seed: int, tokenizer: bytes | None) -> Path:
    return write_directory(
        folder,
        {**TEXT_VERSION_4, "num_hidden_layers": layers},
        random_tensors(text_shapes("model.", layers), seed=seed),
        files={} if tokenizer is None else {"tokenizer.model": tokenizer},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, of which all but the first have one layer and one weights; tokenizers; a file of each kind."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer, _ = tiny_tokenizer(folder)
    other = train_tokenizer(SENTENCES.values(), vocab_size=690, path=folder / "other.model")
    write_model(folder / "model", layers=2, seed=0, tokenizer=tokenizer.model_bytes)
    write_model(folder / "reference", layers=1, seed=1, tokenizer=tokenizer.model_bytes)
    write_model(folder / "stranger", layers=1, seed=1, tokenizer=other.model_bytes)
    write_model(folder / "nameless", layers=1, seed=1, tokenizer=None)
    texts = [{"text": text, "lang": language} for language, text in SENTENCES.items()]
    for name, rows in (("texts", texts), ("chats", [row for row, _ in CHATS]), ("pairs", PAIRS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(folder: Path, *words: object) -> int:
    """The exit code of the command on `model`, whose result goes to out.json."""
    argv = [folder / "model", "--output", folder / "out.json", "--context-tokens", CONTEXT, *words]
    with pytest.raises(SystemExit) as stopped:
        cli.run(evaluate.main, [str(word) for word in argv])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def answers(folder: Path, name: str, tokenizer: Any) -> tuple[list[float], np.ndarray]:
    """The log-probability of each of CHATS, and of both answers of each of PAIRS, from all logits."""
    weights = open_weights(str(folder / name))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        abstract_params(weights.config),
    )
    params = weights.load(abstract)
    dense = Dense(
        binder(weights.config, compute=ComputeConfig(dtype="float32", remat="none")), context=CONTEXT
    )

    def log_prob(ids: np.ndarray, given: int) -> float:
        spans = assistant_spans(ids, tokenizer)[given:]
        return -dense.nats(params, ids, [place for span in spans for place in span])

    chats = [log_prob(ids, given) for ids, (_, given) in zip(chat_tokens(tokenizer), CHATS, strict=True)]
    pairs = [
        [log_prob(ids, given_turns(row)) for ids in pair]
        for row, pair in zip(PAIRS, pair_tokens(tokenizer), strict=True)
    ]
    return chats, np.array(pairs)


def column(lines: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    return [line[name] for line in lines]


@pytest.mark.slow
def test_texts_chats_and_pairs_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = [folder / f"{name}.jsonl" for name in ("texts", "chats", "pairs")]
    assert run(folder, "--data", *data, "--reference", folder / "reference") == 0
    said = capsys.readouterr().out
    result = json.loads((folder / "out.json").read_text())
    tokenizer, _ = tiny_tokenizer(folder)
    chats, policy = answers(folder, "model", tokenizer)
    _, reference = answers(folder, "reference", tokenizer)

    assert result["reference"] == str(folder / "reference") and result["context_tokens"] == CONTEXT
    assert {name: one["kind"] for name, one in result["sets"].items()} == {
        "texts": "text",
        "chats": "chats",
        "pairs": "pairs",
    }
    of_chats = [line for line in result["documents"] if line["set"] == "chats"]
    np.testing.assert_allclose(column(of_chats, "log_prob"), chats, rtol=2e-6)
    assert column(of_chats, "id") == [row.get("id", str(n)) for n, (row, _) in enumerate(CHATS, start=1)]
    assert not any("eos_log_prob" in line for line in of_chats)
    of_texts = [line for line in result["documents"] if line["set"] == "texts"]
    assert len(of_texts) == len(SENTENCES) and all("eos_log_prob" in line for line in of_texts)
    assert len(result["documents"]) == len(of_chats) + len(of_texts)

    lines = result["pairs"]
    assert column(lines, "id") == [row["id"] for row in PAIRS]
    assert column(lines, "lang") == [row["lang"] for row in PAIRS]
    for n, side in enumerate(("chosen", "rejected")):
        np.testing.assert_allclose(column(lines, f"{side}_log_prob"), policy[:, n], rtol=2e-6)
        np.testing.assert_allclose(column(lines, f"reference_{side}_log_prob"), reference[:, n], rtol=2e-6)
    margins = (policy - reference) @ [1, -1]
    metrics = result["sets"]["pairs"]
    assert metrics["accuracy"] == (policy[:, 0] > policy[:, 1]).mean()
    assert metrics["reward_accuracy"] == (margins > 0).mean()
    assert metrics["reward_margin"] == pytest.approx(margins.mean(), rel=1e-4)
    assert metrics["by_language"]["vi"]["reward_margin"] == pytest.approx(margins[3:].mean(), rel=1e-4)
    assert metrics["tokens"] == sum(column(lines, "chosen_tokens"))

    assert tables(result["sets"]) in said
    shown = {tuple(line.split()[:2]): line.split()[2:] for line in said.splitlines() if line.strip()}
    assert shown["pairs", "all"] == [
        f"{metrics['accuracy']:.3f}",
        f"{metrics['accuracy_per_token']:.3f}",
        f"{metrics['loss']:.4f}",
        "6",
        f"{metrics['reward_accuracy']:.3f}",
        f"[{metrics['reward_accuracy_low']:.3f},",
        f"{metrics['reward_accuracy_high']:.3f}]",
        f"{metrics['reward_margin']:.3f}",
    ]
    measured = result["sets"]["chats"]
    assert shown["chats", "all"][:3] == [
        f"{measured['loss']:.4f}",
        f"{measured['perplexity']:.2f}",
        f"{measured['bits_per_byte']:.4f}",
    ]
    assert f"12 documents' and 6 pairs' log-probabilities are in {folder / 'out.json'}" in said


def test_pairs_without_a_reference(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--data", folder / "pairs.jsonl", "--max-documents", 2) == 0
    result = json.loads((folder / "out.json").read_text())
    assert "reference" not in result and result["documents"] == []
    assert column(result["pairs"], "id") == ["p0", "p1"]
    assert not any(
        "reference" in name or "reward" in name for name in (*result["pairs"][0], *result["sets"]["pairs"])
    )
    said = capsys.readouterr().out
    assert "reward" not in said and "\n2 pairs' log-probabilities are in" in said


@pytest.mark.parametrize(
    ("data", "words", "said_of_it"),
    [
        (
            ["texts", "chats"],
            ["reference"],
            "--reference is for pairs of answers, and no file of --data holds any",
        ),
        (["pairs"], ["stranger"], "stranger has another tokenizer"),
        (["pairs"], ["stranger", "--tokenizer", "tiny.model"], "stranger has another tokenizer"),
        (["pairs"], ["nameless"], "nameless holds no tokenizer to compare with"),
        (["pairs"], ["nowhere"], "nowhere"),
    ],
)
def test_a_reference_that_does_not_fit(
    folder: Path, data: list[str], words: list[str], said_of_it: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "out.json").unlink(missing_ok=True)
    given = [folder / word if not word.startswith("--") else word for word in words]
    files = [folder / f"{name}.jsonl" for name in data]
    assert run(folder, "--data", *files, "--reference", *given) == 2
    said = capsys.readouterr().err
    assert said_of_it in said and said.count("\n") == 1
    assert not (folder / "out.json").exists()


def test_a_tokenizer_given_stands_for_a_reference_without_one(folder: Path) -> None:
    options = evaluate.EvaluateOptions(
        checkpoint="model", data=("pairs.jsonl",), output="out", tokenizer=str(folder / "tiny.model")
    )
    weights, reference = (open_weights(str(folder / name)) for name in ("model", "nameless"))
    found = evaluate._load_tokenizer(options, weights, reference)
    assert found.model_bytes == (folder / "tiny.model").read_bytes()
