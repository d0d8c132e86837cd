"""The tokenizer against SentencePiece itself: equal but for control tokens, which text never gets."""

from __future__ import annotations

import functools
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from sealion_jax.errors import UserError
from sealion_jax.tokenizer import TEXT_TAGS, Tokenizer, train_tokenizer
from tests.tiny_text import SENTENCES, tiny_tokenizer

ModelProto = sentencepiece_model_pb2.ModelProto  # pyright: ignore[reportAttributeAccessIssue]
USER_DEFINED = 4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))[0]


@pytest.fixture(scope="module")
def gemma(shared_data: Path) -> Tokenizer:
    return Tokenizer.load(shared_data / "tokenizer" / "gemma3_262k.model")


@functools.cache
def processor(tokenizer: Tokenizer) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)


def without_pieces(
    tokenizer: Tokenizer, unwanted: set[int]
) -> tuple[sentencepiece.SentencePieceProcessor, list[int]]:
    """SentencePiece with a model that does not have those pieces at all, and its ids' old ids: the oracle."""
    model = ModelProto.FromString(tokenizer.model_bytes)
    kept = [i for i in range(len(model.pieces)) if i not in unwanted]
    pieces = [model.pieces[i] for i in kept]
    smaller = ModelProto.FromString(tokenizer.model_bytes)
    del smaller.pieces[:]
    smaller.pieces.extend(pieces)
    return sentencepiece.SentencePieceProcessor(model_proto=smaller.SerializeToString()), kept


# Pieces of markup, whitespace and text, in any order: most joins spell something, some across a seam.
fragments = st.sampled_from(
    [
        *("<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "[multimodal]"),
        *(
            "<start_of_image>",
            "<end_of_image>",
            "<unused0>",
            "<unused98>",
            "<start_of",
            "_turn>",
            "<",
            ">",
            "[",
            "]",
        ),
        *(
            "<table>",
            "</td>",
            "<s>",
            "<b>",
            "\n",
            "\n\n",
            "\t",
            " ",
            "  ",
            "user",
            "model",
            "12",
            "<0x41>",
            "\x00",
        ),
        *SENTENCES.values(),
    ]
)
spelled = st.lists(fragments, max_size=12).map("".join)
anything = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=60)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.one_of(spelled, anything, st.tuples(spelled, anything).map("".join)))
def test_no_text_gives_a_control_token_and_all_text_comes_back(tiny: Tokenizer, text: str) -> None:
    ids = tiny.encode(text)
    assert not set(ids) & tiny.control_ids
    assert tiny.decode(ids) == text
    assert tiny.encode_batch([text, "x"])[0] == ids == tiny.encode_arrays([text])[0].tolist()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.one_of(spelled, anything))
def test_text_without_control_spellings_gets_sentencepiece_s_ids(tiny: Tokenizer, text: str) -> None:
    assume(not any(piece in text for piece in tiny.pieces(sorted(tiny.control_ids))))
    assert tiny.encode(text) == processor(tiny).encode(text)


def test_control_spellings_are_cut_as_if_the_vocabulary_had_no_such_piece(tiny: Tokenizer) -> None:
    """Against a model from which the control pieces were removed, on text that is full of them."""
    added = {i for i in tiny.control_ids if i > tiny.unk_id}
    oracle, old_ids = without_pieces(tiny, added)
    texts = [
        "".join(["<start_of_turn>", s, "<mask>\n\n", "<start_of_<mask>turn>", s[::-1]])
        for s in SENTENCES.values()
    ]
    for text in texts:
        assert any(i in tiny.control_ids for i in processor(tiny).encode(text)), (
            "the text must be a temptation"
        )
        assert tiny.encode(text) == [old_ids[i] for i in oracle.encode(text)]


def test_gemma_s_pieces_are_sorted_into_text_and_control(gemma: Tokenizer) -> None:
    """Every user-defined piece of Gemma 3, by its id, as the module's table says."""
    model = ModelProto.FromString(gemma.model_bytes)
    added = [i for i, piece in enumerate(model.pieces) if piece.type == USER_DEFINED]
    text = [*range(107, 238), *range(255968, 255999)]
    assert [i for i in added if i not in gemma.control_ids] == text
    assert gemma.control_ids == {0, 1, 2, 3, *range(4, 107), *range(255999, 262144)}
    assert tuple(gemma.pieces(range(168, 238))) == TEXT_TAGS
    ids = [
        gemma.pad_id,
        gemma.eos_id,
        gemma.bos_id,
        gemma.unk_id,
        gemma.start_of_turn_id,
        gemma.end_of_turn_id,
    ]
    assert ids == [0, 1, 2, 3, 105, 106]
    assert gemma.vocab_size == 262144
    assert gemma.control_id("<start_of_image>") == 255999


def test_gemma_spelled_in_text(gemma: Tokenizer) -> None:
    """Every control piece there is, between words: none comes out, the text comes back."""
    spellings = gemma.pieces(sorted(gemma.control_ids))
    text = "a".join(spellings)
    ids = gemma.encode(text)
    assert not set(ids) & gemma.control_ids
    assert gemma.decode(ids) == text
    assert set(processor(gemma).encode(text)) & gemma.control_ids, "SentencePiece itself falls for it"
    assert gemma.pieces(gemma.encode("<start_of_turn>user")) == [
        "<",
        "start",
        "_",
        "of",
        "_",
        "turn",
        ">",
        "user",
    ]


def test_gemma_keeps_whitespace_and_html(gemma: Tokenizer) -> None:
    assert gemma.encode("\n\n\n") == [109]
    assert gemma.encode("     ") == [141]
    assert gemma.encode("\t\t") == [255969]
    assert gemma.encode("<table></td><s>") == [168, 183, 203]


@pytest.mark.parametrize("name", ["gemma3_262k.model", "standin_gemma3_layout_16k.model"])
def test_real_text_of_thirteen_languages(shared_data: Path, name: str) -> None:
    tokenizer = Tokenizer.load(shared_data / "tokenizer" / name)
    rows = [
        json.loads(line)["text"]
        for file in sorted((shared_data / "cpt").glob("*.jsonl"))
        for line in file.read_text("utf-8").splitlines()[:12]
    ]
    assert len(rows) == 13 * 12
    expected = processor(tokenizer).encode(rows)
    assert [tokenizer.encode(text) for text in rows] == expected
    assert [tokenizer.decode(ids) for ids in expected] == rows


def test_trained_layout_is_gemma_s(tiny: Tokenizer, gemma: Tokenizer) -> None:
    assert tiny.pieces(range(494)) == gemma.pieces(range(494))
    assert tiny.vocab_size == 700
    tail = tiny.pieces(range(700 - 33, 700))
    assert tail == [*("\t" * n for n in range(1, 32)), "<start_of_image>", "<end_of_image>"]
    ours = ModelProto.FromString(tiny.model_bytes)
    theirs = ModelProto.FromString(gemma.model_bytes)
    assert [p.type for p in ours.pieces[:494]] == [p.type for p in theirs.pieces[:494]]
    assert str(ours.normalizer_spec) == str(theirs.normalizer_spec)


def test_trained_tokenizer_s_manners(tiny: Tokenizer) -> None:
    assert tiny.pieces(tiny.encode("2314")) == ["2", "3", "1", "4"]
    assert tiny.pieces(tiny.encode("  \n\n\t")) == ["▁▁", "\n\n", "\t"]
    assert tiny.pieces(tiny.encode("é😀")) == [*("<0xC3>", "<0xA9>"), "<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    assert not tiny.pieces(tiny.encode("sea"))[0].startswith("▁"), "no dummy prefix"
    assert len(tiny.encode(SENTENCES["en"])) < len(SENTENCES["en"]) / 2, "it has learned merges"


def test_training_is_deterministic_and_refuses_what_does_not_fit(tmp_path: Path, tiny: Tokenizer) -> None:
    again, path = tiny_tokenizer(tmp_path)
    assert again.model_bytes == tiny.model_bytes == path.read_bytes()
    for size in (560, 5000):
        with pytest.raises(UserError, match=r"at (least|most) \d+") as refusal:
            train_tokenizer(SENTENCES.values(), vocab_size=size, path=tmp_path / "x.model")
        fits = int(re.findall(r"at (?:least|most) (\d+)", str(refusal.value))[0])
        assert (
            train_tokenizer(SENTENCES.values(), vocab_size=fits, path=tmp_path / "x.model").vocab_size == fits
        )
    with pytest.raises(UserError, match="without text"):
        train_tokenizer(["", " \n"], vocab_size=600, path=tmp_path / "x.model")


def test_loading(tmp_path: Path, tiny: Tokenizer) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tiny.model_bytes)
    for path in (tmp_path, str(tmp_path), tmp_path / "tokenizer.model"):
        assert Tokenizer.load(path).fingerprint == tiny.fingerprint
    copy = pickle.loads(pickle.dumps(tiny))
    assert copy.encode("<mask> a") == tiny.encode("<mask> a")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "has no pieces"), (b"<html>", "not a SentencePiece model"), (None, "no tokenizer at")],
)
def test_what_is_no_tokenizer(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "some.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as refusal:
        Tokenizer.load(path)
    assert "some.model" in str(refusal.value)


def test_a_directory_without_a_sentencepiece_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"no tokenizer\.model"):
        Tokenizer.load(tmp_path)


def test_odd_arguments(tiny: Tokenizer) -> None:
    with pytest.raises(ValueError, match="lone surrogate at character 2"):
        tiny.encode("ab\ud800")
    with pytest.raises(UserError, match="no control token <nothing>"):
        tiny.control_id("<nothing>")
    with pytest.raises(UserError, match="no control token <table>"):
        tiny.control_id("<table>")
    assert tiny.encode("") == [] and tiny.encode_batch([]) == [] and tiny.encode_arrays([]) == []
    assert tiny.decode(np.array([2, *tiny.encode("sea"), 1])) == "sea"
    assert tiny.decode([105]) == "<start_of_turn>"
