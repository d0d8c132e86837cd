"""Spikes of the loss: when one is called that, and what a run does then."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sealion_jax import train
from sealion_jax.checkpoint.arrays import read_leaf
from sealion_jax.checkpoint.digests import check_digests, write_digests
from sealion_jax.data.store.writer import write_store
from sealion_jax.errors import UserError
from sealion_jax.run.events import read_events
from sealion_jax.tokenizer import Tokenizer
from sealion_jax.training.hooks import NonFiniteError
from sealion_jax.training.spikes import LEAST_LOSSES, SpikeConfig, spike_limit, windowed, with_loss
from tests.commands import commands_in_this_process
from tests.tiny_recipe import config
from tests.tiny_run import copy_run, losses_of, make_world, rows_of

SPIKE = 21
"""The step, counted from 1, whose batch is of texts that no other has."""
STEPS = 26
GO_BACK = ["--spikes.action", "go_back", "--spikes.back-steps", "3"]
LOOK = ["--spikes.deviations", "2", "--spikes.window-steps", "16"]


def test_the_limit_is_so_many_robust_deviations_above_the_median():
    losses = np.random.default_rng(0).normal(3.0, 0.1, 40).astype(np.float32)
    losses[7] = 90.0  # an outlier moves neither
    median = np.median(losses)
    deviation = 1.4826 * np.median(np.abs(losses - median))
    assert float(spike_limit(losses, 6.0)) == pytest.approx(median + 6 * deviation, rel=1e-6)
    assert 3.3 < float(spike_limit(losses, 6.0)) < 3.9


def test_without_enough_losses_nothing_is_a_spike():
    known = [1.0 + n / 100 for n in range(LEAST_LOSSES)]
    few = windowed(known[1:], SpikeConfig(deviations=6))
    assert few.shape == (128,) and np.isinf(spike_limit(few, 6.0))
    assert np.isfinite(spike_limit(with_loss(few, np.float32(1.0)), 6.0))


def test_losses_that_do_not_move_leave_some_room():
    assert 2.0 < float(spike_limit(np.full(20, 2.0, np.float32), 6.0)) < 2.05


def test_the_window_holds_the_newest_losses_last():
    window = windowed(range(100), SpikeConfig(deviations=6, window_steps=16))
    assert window.tolist() == list(range(84, 100))
    assert with_loss(window, np.float32(7)).tolist() == [*range(85, 100), 7]
    assert windowed([1.0], SpikeConfig()) is None


@pytest.mark.parametrize(
    "wrong", [{"deviations": 0.5}, {"window_steps": 8}, {"back_steps": 0}, {"most_times": 0}]
)
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(UserError, match=f"spikes.{next(iter(wrong))}"):
        SpikeConfig(**wrong)


def test_going_back_further_than_checkpoints_reach_is_refused():
    with pytest.raises(UserError, match=r"set checkpoints.keep_last to 5 or more"):
        config(spikes=SpikeConfig(action="go_back", back_steps=1700))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny world whose recipe reads texts of another kind in one batch: the one of step `SPIKE`."""
    world = make_world(tmp_path_factory.mktemp("world"))
    rng = np.random.default_rng(1)
    letters = list("abcdefghijklmnopqrstuvwxyz")
    texts = [" ".join("".join(rng.choice(letters, 3)) for _ in range(30)) for _ in range(60)]
    store = world.folder / "stores" / "strange"
    write_store(
        store,
        [(text, "strange") for text in texts],
        tokenizer=Tokenizer.load(str(world.folder / "tokenizer.model")),
    )
    recipe = Path(world.recipe)
    text = recipe.read_text()
    usual = '{"one": 0.2, "two": 0.2, "three": 0.6}'
    for before, after in (
        (
            f"(StageConfig(start_step=6, weights={usual}),)",
            f"(StageConfig(start_step={SPIKE - 1}, weights={{'strange': 1.0}}), "
            f"StageConfig(start_step={SPIKE}, weights={usual}))",
        ),
        ('("three", 0.2))', '("three", 0.2), ("strange", 0.0))'),
        ("steps=12", f"steps={STEPS}"),
    ):
        assert before in text
        text = text.replace(before, after)
    recipe.write_text(text)
    return world


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(autouse=True)
def left_as_it_was(compiled):
    with commands_in_this_process(cache=compiled):
        yield


@pytest.fixture(scope="module")
def skipped(world, compiled):
    """A run that leaves the update of the spike out."""
    run_dir = world.folder / "skipped"
    with commands_in_this_process(cache=compiled):
        train.main([world.recipe, "--run-dir", str(run_dir), *LOOK, "--checkpoints.keep-last", "6"])
    return run_dir


@pytest.mark.slow
def test_the_update_of_a_spike_is_left_out(skipped):
    rows = {row["step"]: row for row in rows_of(skipped) if "loss" in row}
    assert [step for step, row in rows.items() if row["spike"]] == [SPIKE]
    assert rows[SPIKE]["loss"] > rows[SPIKE]["spike_limit"] > rows[SPIKE - 1]["loss"]
    assert rows[LEAST_LOSSES]["spike_limit"] is None  # infinite, until there is enough to compare with
    assert json.loads((skipped / "summary.json").read_text())["counters"]["spikes"] == 1
    # What it would have done to the weights is not in the step after it.
    assert rows[SPIKE + 1]["loss"] < rows[SPIKE]["spike_limit"]


@pytest.mark.slow
@pytest.mark.parametrize("newest", [18, 22])
def test_a_run_that_goes_on_judges_by_the_same_losses(skipped, world, tmp_path, newest):
    run_dir = copy_run(skipped, tmp_path / "run", newest=newest)
    train.main([world.recipe, "--run-dir", str(run_dir), *LOOK])
    expected = [(row["loss"], row["spike_limit"]) for row in rows_of(skipped) if "loss" in row]
    assert [(row["loss"], row["spike_limit"]) for row in rows_of(run_dir) if "loss" in row] == expected


@pytest.fixture(scope="module")
def gone_back(world, compiled):
    """A run that goes back from the spike, and one that reads the same batches without having met it."""
    run_dir, plain = world.folder / "gone_back", world.folder / "plain"
    keep = ["--checkpoints.keep-every-steps", "16"]
    with commands_in_this_process(cache=compiled):
        train.main([world.recipe, "--run-dir", str(run_dir), *LOOK, *GO_BACK, *keep])
        copy_run(run_dir, plain, newest=16)
        step = plain / "checkpoints" / "16"
        saved = json.loads((step / "train.json").read_text())
        assert saved["skips"] == [] and saved["counters"]["went_back"] == 0
        (step / "train.json").write_text(json.dumps(saved | {"skips": [[SPIKE - 4, 4]]}))
        write_digests(step)
        # The same program, for the same rounding; so many deviations are nothing.
        train.main([world.recipe, "--run-dir", str(plain), *keep, *LOOK, "--spikes.deviations", "1000"])
    return run_dir, plain


@pytest.mark.slow
def test_a_run_goes_back_and_leaves_out_the_batches_up_to_the_spike(gone_back):
    run_dir, plain = gone_back
    (event,) = read_events(run_dir)
    assert event["event"] == "went back"
    assert (event["step"], event["to_step"], event["skipped_batches"]) == (SPIKE, 16, [[SPIKE - 4, 4]])
    last = run_dir / "checkpoints" / str(STEPS)
    saved = json.loads((last / "train.json").read_text())
    assert saved["skips"] == [[SPIKE - 4, 4]]
    assert (saved["counters"]["went_back"], saved["counters"]["spikes"]) == (1, 0)
    assert check_digests(last) == []
    assert [row["step"] for row in rows_of(run_dir)] == list(range(STEPS + 1))
    assert losses_of(run_dir) == losses_of(plain)
    ours, theirs = (read_leaf(path / "checkpoints" / str(STEPS), "embedder/embedding") for path in gone_back)
    assert (ours == theirs).all()


@pytest.mark.slow
def test_a_run_that_may_go_back_no_more_stops(gone_back, world, tmp_path):
    """The spike is met again, since the checkpoint gone on from knows of no skipped batches."""
    run_dir = copy_run(gone_back[0], tmp_path / "run", newest=16)
    train_json = run_dir / "checkpoints" / "16" / "train.json"
    saved = json.loads(train_json.read_text())
    saved["counters"]["went_back"] = 2
    train_json.write_text(json.dumps(saved))
    write_digests(train_json.parent)
    words = [world.recipe, "--run-dir", str(run_dir), *LOOK, *GO_BACK, "--spikes.most-times", "2"]
    with pytest.raises(NonFiniteError, match=r"is a spike .*gone back 2 times already"):
        train.main(words)
    assert [row["step"] for row in rows_of(run_dir)][-1] == SPIKE
