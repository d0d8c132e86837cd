"""Numbers in a plan's tables: small ones keep digits, large ones have no more than they need."""

from __future__ import annotations

import re

import pytest

from sealion_jax.planning.planner import plan
from sealion_jax.planning.tables import count_of_tokens, figure, render, render_search
from sealion_jax.planning.topology import parse_topology
from sealion_jax.recipe import load_recipe


@pytest.mark.parametrize(
    ("value", "decimals", "digits", "told"),
    [
        (63.4, 2, 2, "63.40"),
        (0.95, 2, 2, "0.95"),
        (0.094, 2, 2, "0.094"),
        (0.000123, 2, 2, "0.00012"),
        (67_182.3, 0, 2, "67,182"),
        (3.14, 0, 2, "3.1"),
        (0.006, 3, 1, "0.006"),
        (0.0004, 3, 1, "0.0004"),
        (0.0, 3, 1, "0.000"),
    ],
)
def test_figures(value, decimals, digits, told):
    assert figure(value, decimals, digits=digits) == told


@pytest.mark.parametrize(
    ("tokens", "told"), [(500e9, "500.0B"), (1.5e6, "1.5M"), (614_400, "614.4K"), (12, "12")]
)
def test_tokens(tokens, told):
    assert count_of_tokens(tokens) == told


def test_a_small_recipe_has_digits_left():
    """None of its times, sizes and sums is told as nothing."""
    config = load_recipe("cpt_tiny")
    report = plan(config, config.model, parse_topology("h100:1x2"), tell=lambda line: None)
    shown = render(report)
    assert "Memory of a chip, MiB" in shown
    sums = shown[shown.index("Seconds of a step") : shown.index("Not known here")]
    assert not re.search(r"(?<![\d.])0(\.0+)?B?(?![\d.])", sums)
    assert report["speed"]["overlapped"]["days"] < 0.01
    days = render_search([report]).split()[-1]
    assert float(days) == pytest.approx(report["speed"]["overlapped"]["days"], rel=0.05)
