"""The same run on other numbers of processes: the same rows in every global batch, losses alike."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sealion_jax.data.batches import GlobalBatches
from sealion_jax.recipe import load_recipe
from sealion_jax.run.parts import build
from tests.commands import command_environment, free_port
from tests.tiny_run import copy_run, losses_of, make_world

ROOT = Path(__file__).resolve().parents[2]
STEPS, BATCH = 12, 16
Rows = dict[int, dict[int, str]]
"""Step -> row of the global batch -> hash."""


def trained(world: str, run_dir: Path, processes: int) -> Rows:
    """Trains to the end, with two devices a process; the rows that all devices together saw at each step."""
    address = f"127.0.0.1:{free_port()}"
    records = [run_dir.parent / f"{run_dir.name}-{number}.jsonl" for number in range(processes)]
    words = ["--run-dir", run_dir, "--checkpoints.keep-last", 9, "--join-timeout-seconds", 120]
    words += ["--evaluation.sets", "none"]
    environment = command_environment(devices=2) | {"PYTHONPATH": str(ROOT)}
    environment["XLA_FLAGS"] += " --xla_backend_optimization_level=0"  # compiling is most of the time
    if processes > 1:
        words += ["--coordinator-address", address, "--num-processes", processes]
    with contextlib.ExitStack() as ending:
        running = []
        for number, record in enumerate(records):
            own = ["--process-id", number] if processes > 1 else []
            command = [sys.executable, "-m", "tests.distributed.recorded_train", record, world, *words, *own]
            running.append(
                subprocess.Popen(
                    [str(word) for word in command],
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
            ending.callback(running[-1].kill)
        for process in running:
            output, _ = process.communicate(timeout=600)
            assert process.returncode == 0, output
    together: Rows = {}
    for record in records:
        for line in map(json.loads, record.read_text().splitlines()):
            rows = together.setdefault(line["step"], {})
            for row, content in line["rows"].items():
                assert rows.setdefault(int(row), content) == content
    return together


@pytest.mark.slow
def test_four_processes_then_two_then_one_then_four(tmp_path):
    """Each goes on from a checkpoint of the one before, and sees what one process sees that ran from 0."""
    world = make_world(tmp_path).recipe
    alone = trained(world, tmp_path / "alone", 1)
    assert {step: set(rows) for step, rows in alone.items()} == {n: set(range(BATCH)) for n in range(STEPS)}
    assert len({content for rows in alone.values() for content in rows.values()}) == STEPS * BATCH
    expected = losses_of(tmp_path / "alone")
    before = None
    for name, processes, first in (("four", 4, 0), ("two", 2, 4), ("one", 1, 8), ("four-again", 4, 10)):
        run_dir = tmp_path / name
        if before is not None:
            copy_run(before, run_dir, newest=first)
        rows = trained(world, run_dir, processes)
        assert rows == {step: alone[step] for step in range(first, STEPS)}, name
        losses = losses_of(run_dir)
        assert list(losses) == list(range(1, STEPS + 1))
        np.testing.assert_allclose(list(losses.values()), list(expected.values()), rtol=1e-5)
        before = run_dir


def test_the_documents_of_a_batch_do_not_depend_on_who_reads_which_rows(tmp_path):
    """By the digest that a run's own tools give: documents and tokens of each step's whole batch."""
    config = load_recipe(make_world(tmp_path).recipe)
    batches = GlobalBatches(build(config).mixture, global_batch_size=BATCH)
    whole = [batches.rows(step, range(BATCH)) for step in range(3)]
    assert len({batches.digest(step) for step in range(3)}) == 3
    for processes in (2, 4):
        for step in range(3):
            parts = [batches.rows(step, range(n, BATCH, processes)) for n in range(processes)]
            for n, part in enumerate(parts):
                assert all(np.array_equal(part[name], whole[step][name][n::processes]) for name in part)
