"""What a person sees of a run, also where its numbers are not finite."""

from __future__ import annotations

import json
import math

import numpy as np
from etils import epath
from matplotlib.figure import Figure

from sealion_jax.metrics import plain
from sealion_jax.objectives.base import Metric
from sealion_jax.training.plots import draw_plots
from sealion_jax.training.report import evaluation_table, news, progress_note, summarise, write_summary


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
    assert news(_row(3, **{"web:2024": 2.0})) == "step 3: held-out bits per byte 2.000"


def test_pairs_are_told_by_how_often_the_chosen_answer_wins():
    rows = [
        {
            "step": step,
            "eval/p/accuracy": 0.5,
            "eval/p/reward_accuracy": 0.5 + step / 10,
            "eval/p:id/accuracy": 1.0,
        }
        for step in (0, 4)
    ]
    assert news(rows[1]) == "step 4: held-out accuracy 0.500, reward accuracy 0.900"
    first, second = evaluation_table(rows).split("\n\n")
    assert [line.split() for line in first.splitlines()[1:]] == [["p", "0.500", "0.500"]]
    assert second.splitlines()[1].split() == ["p", "0.500", "0.900"]
    trained = {"step": 2, "loss": 0.5, "tokens_per_second": 10.0, "learning_rate": 1e-4}
    trained |= {"rewards/accuracies": 0.75, "rewards/margins": 1.5}
    assert progress_note(trained).startswith("loss 0.500  accuracy 75%  margin 1.50  10 tok/s")


def test_metrics_of_sources_are_means_of_those_that_the_batch_has():
    metrics = {
        "tokens": np.int32(12),
        "loss": Metric(np.float32(6.0), np.float32(4.0)),
        "loss_by_source": Metric(np.array([6.0, 0.0], np.float32), np.array([4.0, 0.0], np.float32)),
        "rewards/margins_by_source": Metric(np.array([1.0, 3.0]), np.array([2.0, 2.0])),
    }
    row = summarise(metrics, ["id", "th"])
    assert row == {
        "loss": 1.5,
        "loss/id": 1.5,
        "rewards/margins/id": 0.5,
        "rewards/margins/th": 1.5,
        "tokens": 12,
    }
    assert next(iter(row)) == "loss"


def test_a_run_on_pairs_has_a_plot_of_its_rewards(tmp_path):
    row = {"loss": 0.5, "grad_norm": 1.0, "learning_rate": 0.1, "rewards/accuracies": 0.5}
    row |= {f"rewards/{name}": 0.1 for name in ("chosen", "rejected", "margins")}
    rows = [{"step": 0, "eval/p/reward_accuracy": 0.5}, {"step": 1, **row}, {"step": 2, **row}]
    draw_plots(rows, epath.Path(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"loss.png", "preferences.png"}


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
