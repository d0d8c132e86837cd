"""Strided windows and packing of held-out documents, by brute force."""

from __future__ import annotations

import json

import numpy as np
import pytest
from etils import epath

from sealion_jax.errors import UserError
from sealion_jax.evaluation.documents import cut, pack, read_documents, to_arrays


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
    # First fit, longest first, leaves little room.
    assert (batch["segment_ids"] > 0).mean() > 0.9


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
