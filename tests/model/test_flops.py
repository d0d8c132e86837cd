"""Operations a token, against counting them product by product."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sealion_jax.model.config import Gemma3Config, gemma3_27b
from sealion_jax.model.flops import flops_per_token
from sealion_kernels import AttentionMask

TINY = Gemma3Config(
    vocab_size=1000,
    num_layers=8,
    model_dim=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=24,
    feed_forward_dim=160,
    sliding_window_tokens=10,
)


@pytest.mark.parametrize("length", [6, 10, 50])
def test_equals_counting_each_product(length: int) -> None:
    mixing, forward = 0, 2 * length * 64 * 1000  # logits
    for layer in range(8):
        forward += 2 * length * 64 * (4 * 24) * 2  # query and output
        forward += 2 * length * 64 * (2 * 24) * 2  # key and value
        forward += 2 * length * 64 * 160 * 3
        mask = AttentionMask(window=None if layer == 5 else 10)
        seen = int(np.sum(mask.dense(length, length)))
        mixing += 2 * 4 * seen * 24 * 2  # scores, and the mixing of values
    both = forward + mixing
    assert flops_per_token(TINY, length, backward=False) == pytest.approx(both / length)
    assert flops_per_token(TINY, length) == pytest.approx(3 * both / length)
    # Of a frozen weight's product no gradient of the weight; queries, keys and values need all of theirs.
    assert flops_per_token(TINY, length, frozen=True) == pytest.approx((3 * both - forward) / length)


def test_27b_at_8192_tokens() -> None:
    assert flops_per_token(gemma3_27b(), 8192) == pytest.approx(166.5e9, rel=1e-3)
    # Taken as global, every layer would cost more.
    all_global = replace(gemma3_27b(), layers_per_block=1)
    assert flops_per_token(all_global, 8192) > 170e9
