"""What a person sees of a run, also where its numbers are not finite."""

from __future__ import annotations

import json
import math

from etils import epath
from matplotlib.figure import Figure

from sealion_jax.metrics import plain
from sealion_jax.training.plots import draw_plots
from sealion_jax.training.report import evaluation_table, news, write_summary


def _row(step: int, **bits: float) -> dict:
    return {"step": step, **{f"eval/{name}/bits_per_byte": value for name, value in bits.items()}}


BEFORE = plain(_row(0, news=2.0, **{"news:id": 1.5, "news:ms": 2.5, "web": 3.0}))
AFTER = plain(_row(9, news=1.0, **{"news:id": math.nan, "news:ms": 2.25, "web": math.inf, "new": 4.0}))


def test_the_table_has_every_set_before_and_after():
    assert [line.split() for line in evaluation_table([BEFORE, AFTER]).splitlines()] == [
        ["bits", "per", "byte", "step", "0", "step", "9"],
        ["news", "2.000", "1.000"],
        ["news:id", "1.500", "not", "finite"],
        ["news:ms", "2.500", "2.250"],
        ["web", "3.000", "not", "finite"],
        ["new", "4.000"],
    ]
    assert len({len(line) for line in evaluation_table([BEFORE, AFTER]).splitlines()}) == 1


def test_the_mean_is_over_sets_and_not_over_their_languages_again():
    assert news(BEFORE) == "step 0: held-out bits per byte 2.500 (mean of 2)"
    # A set may have a colon in its name.
    assert news(_row(3, **{"web:2024": 2.0})) == "step 3: held-out bits per byte 2.000 (mean of 1)"


def test_a_run_of_numbers_that_are_not_finite_has_its_plots_and_summary(tmp_path, monkeypatch):
    figures: list[Figure] = []
    write = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *to, **how: (figures.append(figure), write(figure, *to, **how))
    )
    rows = [
        plain(row)
        for row in (
            _row(0, never=math.nan, web=2.0),
            {"step": 1, "loss": math.nan, "grad_norm": math.inf, "learning_rate": 0.1},
            {"step": 2, "loss": 2.0, "grad_norm": math.nan, "learning_rate": 0.1},
            _row(2, never=math.nan, web=math.inf),
        )
    ]
    draw_plots(rows, epath.Path(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"loss.png", "bits_per_byte.png"}
    assert [line.get_label() for line in figures[1].axes[0].lines] == ["web"]
    write_summary(epath.Path(tmp_path), rows[:2], {})
    assert json.loads((tmp_path / "summary.json").read_text())["final_loss"] is None
