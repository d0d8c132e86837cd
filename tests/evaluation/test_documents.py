"""Held-out documents read as `prepare` reads them; strided windows and packing, by brute force."""

from __future__ import annotations

import gzip
import json
import time

import numpy as np
import pytest
import zstandard
from etils import epath

from sealion_jax.data.inputs.rows import Document as Row
from sealion_jax.data.inputs.sources import ReadOptions, find_sources
from sealion_jax.data.inputs.text_files import Position
from sealion_jax.errors import UserError
from sealion_jax.evaluation.config import EvaluationConfig
from sealion_jax.evaluation.documents import read_documents
from sealion_jax.evaluation.windows import cut, pack, to_arrays


@pytest.mark.parametrize("length", [2, 5, 6, 7, 8, 12, 13, 30])
@pytest.mark.parametrize("context", [4, 6])
def test_every_token_is_scored_once_with_enough_context(length, context):
    ids = [2, *range(10, 10 + length - 2), 1]
    scored: list[int] = []
    for piece in cut(0, ids, context=context):
        assert len(piece.tokens) == len(piece.targets) <= context
        assert piece.tokens[0] == 2
        # Inside a piece every target is the next input.
        np.testing.assert_array_equal(piece.tokens[1:], piece.targets[:-1])
        if scored:
            assert piece.num_context >= context // 2
        scored += piece.targets[piece.num_context :].tolist()
    assert scored == ids[1:]


def test_packing_holds_every_piece_once_and_numbers_segments():
    rng = np.random.default_rng(0)
    pieces = []
    for n, length in enumerate(rng.integers(2, 40, size=50)):
        pieces += cut(n, [2, *rng.integers(10, 99, length), 1], context=16)
    rows = pack(pieces, row_length=16)
    assert sorted(n for row in rows for n in row) == list(range(len(pieces)))
    batch = to_arrays(pieces, rows, row_length=16)
    for b, row in enumerate(rows):
        for segment, number in enumerate(row, start=1):
            where = batch["segment_ids"][b] == segment
            np.testing.assert_array_equal(batch["tokens"][b, where], pieces[number].tokens)
            np.testing.assert_array_equal(batch["targets"][b, where], pieces[number].targets)
            np.testing.assert_array_equal(batch["positions"][b, where], np.arange(where.sum()))
    # Best fit, longest first, leaves little room.
    assert (batch["segment_ids"] > 0).mean() > 0.9


def first_fit(lengths, row_length):
    """Rows that first fit, longest first, takes: at most 11/9 of the best and 2/3 of a row more."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        place = next((row for row, free in enumerate(room) if free >= length), len(room))
        room[place:] = room[place:] or [row_length]
        room[place] -= length
    return len(room)


@pytest.mark.parametrize("seed", range(5))
def test_packing_is_as_good_as_first_fit(seed):
    rng = np.random.default_rng(seed)
    lengths = np.concatenate([rng.integers(1, 65, 300), np.minimum(rng.geometric(0.1, 300), 64)])
    pieces = [piece for n, length in enumerate(lengths) for piece in cut(n, range(length + 1), context=64)]
    rows = pack(pieces, row_length=64)
    assert max(sum(len(pieces[n].tokens) for n in row) for row in rows) <= 64
    assert len(rows) <= first_fit(lengths, 64) + 1
    assert rows == pack(pieces, row_length=64)


def test_packing_of_many_pieces_that_share_no_row():
    """First fit would look at each of the rows before for each piece: a thousand million looks."""
    pieces = [piece for n in range(40_000) for piece in cut(n, range(7), context=10)]
    start = time.process_time()
    assert len(pack(pieces, row_length=10)) == 40_000
    assert time.process_time() - start < 5


@pytest.mark.parametrize("context", [0, -1])
def test_a_context_without_room_is_refused(context):
    with pytest.raises(ValueError, match=f"a context of {context} tokens has no room"):
        list(cut(0, [2, 10, 11, 1], context=context))


def test_a_context_of_one_token_scores_each_from_bos():
    pieces = list(cut(0, [2, 10, 11, 1], context=1))
    assert [(piece.tokens.tolist(), piece.targets.tolist()) for piece in pieces] == [
        ([2], [token]) for token in (10, 11, 1)
    ]


def test_read_documents_names_the_bad_line(tmp_path):
    path = epath.Path(tmp_path / "set.jsonl")
    path.write_text('{"text": "satu", "lang": "id"}\n{"text": 3}\n')
    with pytest.raises(UserError, match=r"set\.jsonl:2"):
        read_documents(str(path))
    with pytest.raises(UserError, match="no evaluation file"):
        read_documents(str(tmp_path / "none.jsonl"))
    path.write_text(json.dumps({"text": "ขอบคุณ", "lang": "th"}) + "\n")
    (document,) = read_documents(str(path))
    assert (document.language, document.num_bytes, document.id) == ("th", 18, "1")


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_read_documents_as_prepare_does(tmp_path, suffix):
    rows = [
        '\ufeff{"text": "satu", "lang": "id", "id": "a"}\r',
        "",
        '{"text": "dua", "lang": null, "id": null}',
        '{"text": "tiga", "id": "a"}',
        '{"text": " "}',
        '{"text": "empat", "lang": "", "id": 7}',
        "",
    ]
    packers = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(packers[suffix]("\n".join(rows).encode()))
    found = [(x.text, x.language, x.id, x.num_bytes) for x in read_documents(str(path))]
    assert found == [
        ("satu", "id", "a", 4),
        ("dua", "und", "3", 3),
        ("tiga", "und", "a", 4),
        ("empat", "und", "7", 5),
    ]
    (source,) = find_sources([str(path)], ReadOptions())
    prepared = [
        x for c in source.chunks(ReadOptions(), start=Position()) for x in c.rows(ReadOptions().names)
    ]
    assert [(x.text, x.language) for x in prepared if isinstance(x, Row)] == [x[:2] for x in found]
    assert [x.text for x in read_documents(str(path), limit=2)] == ["satu", "dua"]


@pytest.mark.parametrize("row", ['["text"]', '{"text": "a", "lang": 5}', '{"text": "\\ud800"}', "{"])
def test_read_documents_refuses_what_prepare_would_skip(tmp_path, row):
    (tmp_path / "set.jsonl").write_text('{"text": "satu"}\n\n' + row)
    with pytest.raises(UserError, match=r"set\.jsonl:3: not a JSON object with a `text` string"):
        read_documents(str(tmp_path / "set.jsonl"))


def test_read_documents_refuses_a_file_that_is_cut_short(tmp_path):
    packed = gzip.compress(b'{"text": "satu"}\n' * 1000)
    (tmp_path / "set.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(UserError, match="cannot be read to its end"):
        read_documents(str(tmp_path / "set.jsonl.gz"))


@pytest.mark.parametrize(
    ("field", "value"), [("interval_steps", -1), ("batch_size", 0), ("max_documents", 0)]
)
def test_numbers_that_make_no_evaluation_are_refused(field, value):
    with pytest.raises(UserError, match=f"evaluation.{field} must"):
        EvaluationConfig(**{field: value})
