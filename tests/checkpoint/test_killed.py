"""A run that is killed at any moment, also while it saves, finds a good checkpoint when it starts again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.checkpoint.killed_saves import MOMENTS
from tests.commands import command_environment

ROOT = Path(__file__).resolve().parents[2]


def test_every_kill_is_survived(tmp_path: Path) -> None:
    """Eight kills at random moments and one at each moment that matters, in one run directory.

    Each start restores a state that is right, bit for bit, and not older than the last one said to be
    complete.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.checkpoint.killed_saves", str(tmp_path / "run"), "3", "8"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=command_environment() | {"PYTHONPATH": str(ROOT)},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rounds = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rounds) == 8 + len(MOMENTS) + 1
    complete = 0
    for number, kill in enumerate(rounds):
        assert kill["errors"] == [], (number, kill)
        assert len(kill["restored"]) == 1, (number, kill)
        assert kill["restored"][0] >= complete, (number, kill, rounds[number - 1])
        complete = kill["complete"]
    assert complete > 8
    # The kills did hit saves under way: most leave something that the next start must pass over.
    assert sum(kill["left_over"] != [] for kill in rounds) >= len(MOMENTS) - 1
