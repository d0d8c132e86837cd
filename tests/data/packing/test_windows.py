"""Packed windows against a reference that walks token by token, and against the rules they keep."""

from __future__ import annotations

import itertools

import grain
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sealion_jax.data.packing.windows import PackedWindows
from sealion_jax.errors import UserError
from tests.data.token_documents import BOS, EOS, distinct_documents, store_of

ARRAYS = ("tokens", "targets", "loss_mask", "segment_ids", "positions")


def reference(documents: list[list[int]], length: int, window: int) -> dict[str, list]:
    """A window by the rules in words: one position after the other, nothing vectorised."""
    whole = [[BOS, *text, EOS] for text in documents]
    stream = [(d, p, token) for d, document in enumerate(whole) for p, token in enumerate(document)]
    start = window * (length - 1)
    row = {name: [] for name in ARRAYS}
    segment, position, previous = 0, 0, None
    inside = stream[start][1] != 0
    if inside:
        segment, position, previous = 1, 1, stream[start][0]
        for name, value in zip(ARRAYS, (BOS, stream[start][2], 0, 1, 0), strict=True):
            row[name].append(value)
    for index in range(start, min(start + length - 1, len(stream))):
        document, _, token = stream[index]
        if document != previous:
            segment, position, previous = segment + 1, 0, document
        following = stream[index + 1] if index + 1 < len(stream) else None
        row["tokens"].append(token)
        row["targets"].append(following[2] if following else 0)
        row["loss_mask"].append(int(following is not None and following[0] == document))
        row["segment_ids"].append(segment)
        row["positions"].append(position)
        position += 1
    return {name: values + [0] * (length - len(values)) for name, values in row.items()}


def number_of_windows(documents: list[list[int]], length: int) -> int:
    tokens = sum(len(text) + 2 for text in documents)
    return -(-(tokens - 1) // (length - 1))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(0, 12), min_size=1, max_size=12), length=st.integers(2, 17))
def test_windows_equal_a_walk_token_by_token(tmp_path_factory, lengths, length):
    documents = distinct_documents(lengths)
    store = store_of(tmp_path_factory.mktemp("store"), documents, shard_tokens=7)
    windows = PackedWindows(store, length)
    assert len(windows) == number_of_windows(documents, length)
    for window in range(len(windows)):
        row = windows.row(window)
        for name, values in reference(documents, length, window).items():
            np.testing.assert_array_equal(row[name], values, err_msg=f"{name} of window {window}")


def test_the_boundary_rules_written_out(tmp_path):
    windows = PackedWindows(store_of(tmp_path, [[11, 12, 13, 14, 15], [21, 22, 23]]), 6)
    rows = [windows.row(i) for i in range(3)]
    assert [row["tokens"].tolist() for row in rows] == [
        [2, 11, 12, 13, 14, 0],  # begins with the document's own <bos>: the last slot is padding
        [2, 15, 1, 2, 21, 22],  # begins inside it: <bos> inserted
        [2, 23, 1, 0, 0, 0],  # the store ends
    ]
    assert [row["targets"].tolist() for row in rows] == [
        [11, 12, 13, 14, 15, 0],
        [15, 1, 2, 21, 22, 23],
        [23, 1, 0, 0, 0, 0],
    ]
    assert [row["loss_mask"].tolist() for row in rows] == [
        [1, 1, 1, 1, 1, 0],
        [0, 1, 0, 1, 1, 1],  # 0 at the inserted <bos>, and at <eos>
        [0, 1, 0, 0, 0, 0],
    ]
    assert [row["segment_ids"].tolist() for row in rows] == [
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 2, 2, 2],
        [1, 1, 1, 0, 0, 0],
    ]
    assert [row["positions"].tolist() for row in rows] == [
        [0, 1, 2, 3, 4, 0],
        [0, 1, 2, 0, 1, 2],
        [0, 1, 2, 0, 0, 0],
    ]
    assert {name: (row.dtype.name, row.shape) for name, row in rows[0].items()} == {
        "tokens": ("int32", (6,)),
        "targets": ("int32", (6,)),
        "loss_mask": ("float32", (6,)),
        "segment_ids": ("int32", (6,)),
        "positions": ("int32", (6,)),
    }


@pytest.mark.parametrize("length", [2, 3, 8, 31, 1000])
def test_every_text_token_and_eos_is_predicted_once_and_no_bos(tmp_path, length):
    lengths = np.random.default_rng(length).integers(0, 40, 50).tolist()
    documents = distinct_documents(lengths)
    windows = PackedWindows(store_of(tmp_path, documents, shard_tokens=101), length)
    learned = []
    for window in range(len(windows)):
        row = windows.row(window)
        learned += row["targets"][row["loss_mask"] == 1].tolist()
    assert [token for token in learned if token != EOS] == list(itertools.chain(*documents))
    assert learned.count(EOS) == len(documents)
    assert BOS not in learned


def test_a_target_follows_its_token_in_the_same_document(tmp_path):
    documents = distinct_documents([5, 30, 1, 2, 60, 9])
    followers = {}
    for text in documents:
        followers |= dict(itertools.pairwise([*text, EOS]))
    first_tokens = {text[0] for text in documents}
    windows = PackedWindows(store_of(tmp_path, documents), 8)
    for window in range(len(windows)):
        row = windows.row(window)
        for t in np.flatnonzero(row["loss_mask"]):
            token, target = int(row["tokens"][t]), int(row["targets"][t])
            assert target in first_tokens if token == BOS else target == followers[token]


def test_spans_say_where_every_token_of_a_row_is_in_its_document(tmp_path):
    documents = distinct_documents([5, 0, 30, 1, 2, 60, 9])
    languages = ["id", "th", "id", "vi", "th", "vi", "id"]
    store = store_of(tmp_path, documents, languages=languages)
    windows = PackedWindows(store, 8)
    for window in range(len(windows)):
        row, spans = windows.row(window), windows.spans(window)
        assert [span.segment for span in spans] == list(range(1, row["segment_ids"].max() + 1))
        for span in spans:
            place = row["segment_ids"] == span.segment
            assert np.flatnonzero(place).tolist() == list(range(span.row_start, span.row_stop))
            document = store.document(span.document)
            assert span.document_tokens == len(document) and span.language == languages[span.document]
            part = document[span.start : span.stop].tolist()
            inserted = [BOS] * (span.row_stop - span.row_start - len(part))
            assert row["tokens"][place].tolist() == inserted + part


def test_windows_are_a_grain_dataset_with_random_access(tmp_path):
    windows = PackedWindows(store_of(tmp_path, distinct_documents([30] * 10)), 16)
    assert isinstance(windows, grain.MapDataset)
    count = len(windows)
    shuffled = windows.seed(3).shuffle().repeat(2)
    first_tokens = {int(windows.row(i)["targets"][0]) for i in range(count)}
    assert {int(shuffled[i]["targets"][0]) for i in range(count)} == first_tokens
    np.testing.assert_array_equal(windows[count + 1]["tokens"], windows[1]["tokens"])
    assert len(windows[2:5]) == 3
    with pytest.raises(IndexError):
        windows.spans(count)


def test_stores_that_cannot_be_packed_are_refused(tmp_path):
    with pytest.raises(UserError, match="no documents"):
        PackedWindows(store_of(tmp_path / "empty", []), 8)
    good = store_of(tmp_path / "good", [[5, 6]])
    with pytest.raises(UserError, match="sequence_length_tokens is 1"):
        PackedWindows(good, 1)
    path = tmp_path / "good" / "tokens-00000.bin"
    path.write_bytes(np.array([7, 5, 6, 1], "<u4").tobytes())
    with pytest.raises(UserError, match="begins with token 7"):
        PackedWindows(type(good).open(good.path), 8)
