"""The mask against a loop over its definition, and the drawing in its docstring."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import cast

import jax.numpy as jnp
import numpy as np
import pytest

from sealion_kernels import AttentionMask


def drawn(picture: str) -> np.ndarray:
    return np.array([[cell == "x" for cell in row.split()] for row in picture.strip().splitlines()])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3, 9])
@pytest.mark.parametrize("offset", [0, 4])
@pytest.mark.parametrize("with_spans", [True, False])
def test_every_pair_is_as_defined(causal: bool, window: int | None, offset: int, with_spans: bool) -> None:
    T, S = 5, 9
    queries = np.array([[1, 1, 2, 2, 0], [1, 2, 3, 3, 3]])
    keys = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0], [1, 2, 2, 2, 3, 3, 3, 3, 4]])
    query_spans = np.array([[0, 3, 3, 0, 0], [4, 4, 0, 7, 7]])
    key_spans = np.array([[0, 3, 3, 3, 3, 0, 3, 0, 0], [4, 0, 0, 4, 7, 7, 7, 7, 7]])
    spans = {"query_spans": jnp.asarray(query_spans), "key_spans": jnp.asarray(key_spans)}
    mask = AttentionMask(
        causal=causal,
        window=window,
        query_offset=offset,
        query_segments=jnp.asarray(queries),
        key_segments=jnp.asarray(keys),
        **(spans if with_spans else {}),
    )
    expected = np.zeros((2, T, S), bool)
    for b, t, s in itertools.product(range(2), range(T), range(S)):
        q = t + offset
        expected[b, t, s] = (
            (s <= q or not causal or (with_spans and 0 < query_spans[b, t] == key_spans[b, s]))
            and (window is None or abs(q - s) <= window - 1)
            and queries[b, t] == keys[b, s]
        )
    np.testing.assert_array_equal(mask.dense(T, S), expected)


def test_pictures_of_the_docstring() -> None:
    segments = jnp.array([[1, 1, 1, 2, 2]])
    pictures = [
        (
            AttentionMask(window=3),
            "x . . . .\n x x . . .\n x x x . .\n . x x x .\n . . x x x",
        ),
        (
            AttentionMask(query_segments=segments, key_segments=segments),
            "x . . . .\n x x . . .\n x x x . .\n . . . x .\n . . . x x",
        ),
        (
            AttentionMask(causal=False, window=2),
            "x x . . .\n x x x . .\n . x x x .\n . . x x x\n . . . x x",
        ),
    ]
    for mask, picture in pictures:
        np.testing.assert_array_equal(mask.dense(5, 5)[0], drawn(picture))
    spans = jnp.array([[0, 1, 1, 1, 0]])
    image = AttentionMask(query_spans=spans, key_spans=spans)
    np.testing.assert_array_equal(
        image.dense(5, 5)[0], drawn("x . . . .\n x x x x .\n x x x x .\n x x x x .\n x x x x x")
    )
    np.testing.assert_array_equal(
        replace(image, window=2).dense(5, 5)[0],
        drawn("x . . . .\n x x x . .\n . x x x .\n . . x x .\n . . . x x"),
    )
    two_queries = AttentionMask(query_offset=3).dense(2, 5)[0]
    np.testing.assert_array_equal(two_queries, drawn("x x x x .\n x x x x x"))


def test_what_cannot_be_a_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="window must be at least 1"):
        AttentionMask(window=0)
    for window in (2.5, 3.0, "3"):
        with pytest.raises(ValueError, match=f"window must be a whole number of keys, not {window!r}"):
            AttentionMask(window=cast(int, window))
    assert AttentionMask(window=cast(int, np.int64(3))) == AttentionMask(window=3)
    with pytest.raises(ValueError, match="give both or neither"):
        AttentionMask(query_segments=jnp.ones((1, 4), jnp.int32))
