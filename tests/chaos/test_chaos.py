"""Six kills at named points: the run ends as if nothing had happened. drill.py has thirty at random ones."""

from __future__ import annotations

import random

import pytest

from tests.chaos.kills import Kill, Run, different_arrays, random_kills
from tests.commands import command_environment
from tests.tiny_run import make_world

STEPS = 24
OPTIONS = (
    *("--steps", STEPS, "--evaluation.sets", "none", "--checkpoints.interval-steps", 2),
    *("--watch.beat-seconds", 0.5, "--watch.silent-seconds", 5),
    *("--join-timeout-seconds", 45),
)
KILLS = (
    Kill(point="compiling", victims="all"),
    Kill(point="stepping", victims="one"),
    Kill(point="saving", victims="all"),
    Kill(point="restoring", victims="first"),
    Kill(point="starting", victims="all"),
    Kill(point="saving", victims="one"),
)


def test_thirty_kills_have_every_point_and_every_victim():
    kills = random_kills(36, seed=0)
    assert len(kills) == 36 and len(set(kills)) == 18
    assert kills == random_kills(36, seed=0) != random_kills(36, seed=1)


@pytest.mark.slow
def test_killed_at_six_points_a_run_of_two_processes_ends_with_the_same_weights(tmp_path):
    world = make_world(tmp_path)
    environment = command_environment(devices=2, cache=tmp_path / "compiled")
    undisturbed, disturbed = (
        Run(world.recipe, str(tmp_path / name), OPTIONS, environment) for name in ("undisturbed", "disturbed")
    )
    undisturbed.finish()
    chance = random.Random(0)
    for kill in KILLS:
        assert disturbed.disturb(kill, chance) is not None, f"ended before {kill}"
    disturbed.finish()
    assert disturbed.losses() == undisturbed.losses()
    assert different_arrays(disturbed.run_dir, undisturbed.run_dir, STEPS) == []
