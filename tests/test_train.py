"""Whole runs: what they leave, resuming on other meshes, surviving kills and damage, refusing bad input."""

from __future__ import annotations

import json
import random
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from sealion_jax import evaluate, train
from sealion_jax.errors import UserError
from tests.commands import command_environment, start
from tests.tiny_run import TinyWorld, copy_run, losses_of, make_world, rows_of, scalars_of

STEPS = 12


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> TinyWorld:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """One CPU device, and compiled steps that the commands of this module share."""
    return command_environment(cache=tmp_path_factory.mktemp("compiled"))


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate()
    return process.returncode, output


@pytest.fixture(scope="module")
def undisturbed(world, environment) -> tuple[Path, str]:
    """A run of twelve steps on one device that nothing happened to, and what it printed."""
    run_dir = world.folder / "undisturbed"
    code, output = finish(start("train", world.recipe, "--run-dir", run_dir, environment=environment))
    assert code == 0, output
    return run_dir, output


def test_a_run_leaves_everything_it_should(undisturbed):
    run_dir, output = undisturbed
    rows = rows_of(run_dir)
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    assert rows[-1]["eval/held-out/bits_per_byte"] < 0.9 * rows[0]["eval/held-out/bits_per_byte"]
    assert {"eval/held-out:id/loss", "eval/held-out:ms/perplexity"} <= rows[6].keys()
    for name in ("loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "data_wait_seconds"):
        assert all(row[name] is not None for row in rows[1:]), name
    for name in ("config.json", "summary.json", "plots/loss.png", "plots/bits_per_byte.png"):
        assert (run_dir / name).stat().st_size > 0
    assert sorted(int(path.name) for path in (run_dir / "checkpoints").iterdir()) == [8, 10, 12]
    assert [step for step, _ in scalars_of(run_dir / "tensorboard")["loss"]] == list(range(1, STEPS + 1))
    assert "python -m sealion_jax.evaluate" in output
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["step"], summary["final_loss"]) == (STEPS, rows[-1]["loss"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 4}],
    ids=lambda mesh: "-".join(f"{axis}{size}" for axis, size in mesh.items()),
)
def test_a_run_goes_on_over_another_mesh(undisturbed, world, tmp_path, mesh):
    """From one device onto eight: the same documents, losses within 1e-5, and back onto one."""
    assert len(jax.devices()) == 8
    source, _ = undisturbed
    run_dir = copy_run(source, tmp_path / "run", newest=8)
    axes = [word for axis, size in mesh.items() for word in (f"--mesh.{axis}", str(size))]
    train.main([world.recipe, "--run-dir", str(run_dir), *axes])
    expected, found = losses_of(source), losses_of(run_dir)
    assert found.keys() == expected.keys()
    assert [found[step] for step in range(1, 9)] == [expected[step] for step in range(1, 9)]
    after = range(9, STEPS + 1)
    np.testing.assert_allclose([found[s] for s in after], [expected[s] for s in after], rtol=1e-5)
    assert [r["tokens"] for r in rows_of(run_dir)[1:]] == [r["tokens"] for r in rows_of(source)[1:]]


def _wait_for(condition, process: subprocess.Popen[str], *, seconds: float = 120) -> bool:
    """Waits until the condition holds (True) or the process has ended (False)."""
    deadline = time.monotonic() + seconds
    while process.poll() is None:
        if condition():
            return True
        assert time.monotonic() < deadline, "the run did not come this far"
        time.sleep(0.002)
    return False


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_as_if_nothing_had_happened(undisturbed, world, environment, tmp_path):
    """SIGKILL while starting, between saves, and in the middle of saves, until the run is through."""
    source, _ = undisturbed
    run_dir = tmp_path / "run"
    chance = random.Random(0)
    kills = 0

    def saving() -> bool:
        return any((run_dir / "checkpoints").glob("*.unfinished"))

    def trained(step: int) -> bool:
        path = run_dir / "metrics.jsonl"
        return path.exists() and len(path.read_text().splitlines()) > step

    moments = [
        (run_dir / "config.json").exists,
        saving,
        lambda: trained(3),
        saving,
        lambda: trained(6),
        saving,
        lambda: trained(9),
    ]
    for moment in moments:
        process = start("train", world.recipe, "--run-dir", run_dir, environment=environment)
        if _wait_for(moment, process):
            time.sleep(chance.uniform(0, 0.02))
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
    code, output = finish(start("train", world.recipe, "--run-dir", run_dir, environment=environment))
    assert code == 0, output
    assert kills >= 5
    assert losses_of(run_dir) == losses_of(source)
    assert [row["step"] for row in rows_of(run_dir)] == list(range(STEPS + 1))
    assert scalars_of(run_dir / "tensorboard")["loss"] == scalars_of(source / "tensorboard")["loss"]


@pytest.mark.slow
def test_sigterm_saves_and_says_run_me_again(undisturbed, world, environment, tmp_path):
    source, _ = undisturbed
    run_dir = tmp_path / "run"
    process = start(
        "train",
        world.recipe,
        "--run-dir",
        run_dir,
        "--checkpoints.interval-steps",
        1000,
        environment=environment,
    )
    path = run_dir / "metrics.jsonl"
    assert _wait_for(lambda: path.exists() and len(path.read_text().splitlines()) > 2, process)
    process.terminate()
    code, output = finish(process)
    assert code == 75, output
    assert "run me again" in output
    (saved,) = (int(p.name) for p in (run_dir / "checkpoints").iterdir())
    assert 2 <= saved < STEPS
    code, output = finish(start("train", world.recipe, "--run-dir", run_dir, environment=environment))
    assert code == 0, output
    assert f"resuming after step {saved}" in output
    assert losses_of(run_dir) == losses_of(source)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    undisturbed, world, environment, tmp_path, damage
):
    source, _ = undisturbed
    run_dir = copy_run(source, tmp_path / "run", newest=10)
    victim = max(
        (run_dir / "checkpoints" / "10" / "params").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size
    )
    if damage == "flip":
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    elif damage == "truncate":
        victim.write_bytes(victim.read_bytes()[:-1])
    else:
        victim.unlink()
    code, output = finish(start("train", world.recipe, "--run-dir", run_dir, environment=environment))
    assert code == 0, output
    assert victim.name in output
    assert "resuming after step 8" in output
    assert losses_of(run_dir) == losses_of(source)


@pytest.mark.slow
def test_two_processes_train_as_one(undisturbed, world, tmp_path):
    """Two processes of two devices each, over gloo: the same documents, losses within 1e-5."""
    source, _ = undisturbed
    run_dir = copy_run(source, tmp_path / "run", newest=8)
    environment = command_environment(devices=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [
        start(
            "train",
            world.recipe,
            "--run-dir",
            run_dir,
            "--coordinator-address",
            address,
            "--num-processes",
            2,
            "--process-id",
            number,
            environment=environment,
        )
        for number in range(2)
    ]
    for process in processes:
        code, output = finish(process)
        assert code == 0, output
    expected, found = losses_of(source), losses_of(run_dir)
    after = range(9, STEPS + 1)
    np.testing.assert_allclose([found[s] for s in after], [expected[s] for s in after], rtol=1e-5)
    assert [r["tokens"] for r in rows_of(run_dir)[1:]] == [r["tokens"] for r in rows_of(source)[1:]]


def test_evaluate_agrees_with_the_run(undisturbed, world, tmp_path):
    source, _ = undisturbed
    output = tmp_path / "scores.json"
    evaluate.main([str(source), "--data", world.held_out, "--output", str(output), "--context-tokens", "32"])
    result = json.loads(output.read_text())
    measured = result["sets"]["held_out"]
    assert measured["bits_per_byte"] == pytest.approx(
        rows_of(source)[-1]["eval/held-out/bits_per_byte"], rel=1e-5
    )
    documents = result["documents"]
    assert len(documents) == measured["documents"] == 12
    nats = -sum(document["log_prob"] for document in documents)
    assert nats / np.log(2) / sum(document["bytes"] for document in documents) == pytest.approx(
        measured["bits_per_byte"]
    )


def _refused(arguments: list, match: str) -> None:
    with pytest.raises(UserError, match=match):
        train.main([str(argument) for argument in arguments])


def test_mistakes_are_refused_before_anything_is_written(world, tmp_path):
    run = ["--run-dir", tmp_path / "run"]
    _refused([world.recipe, *run, "--global-batch-size", 12], "multiple of 8")
    _refused([world.recipe, *run, "--mesh.fsdp", 3], "does not fit 8 devices")
    _refused([world.recipe, *run, "--optimizer.weigth-decay", 1], "weight.decay")
    _refused([world.recipe, *run, "--steps", "many"], "steps")
    _refused(["tinny", *run], "tinny")
    _refused([world.recipe, *run, "--compute.dtype", "float16"], "float16")
    _refused([world.recipe, *run, "--init-from", tmp_path / "nowhere"], "no checkpoint at")
    other = tmp_path / "tokenizer.model"
    shutil.copy(Path(world.folder) / "tokenizer.model", other)
    from sealion_jax.tokenizer import train_tokenizer

    train_tokenizer(["lain sekali, bukan yang sama " * 3] * 20, vocab_size=560, path=other)
    _refused([world.recipe, *run, "--tokenizer", other], "tokenizer")
    assert not (tmp_path / "run").exists()


def test_a_run_directory_of_another_recipe_is_refused(undisturbed, world, tmp_path):
    source, _ = undisturbed
    run_dir = copy_run(source, tmp_path / "run", newest=8)
    before = {path: path.read_bytes() for path in run_dir.rglob("*.json*") if "lease" not in path.parts}
    _refused([world.recipe, "--run-dir", run_dir, "--model.feed-forward-dim", 96], "feed_forward_dim")
    _refused([world.recipe, "--run-dir", run_dir, "--global-batch-size", 8], "global_batch_size")
    after = {path: path.read_bytes() for path in run_dir.rglob("*.json*") if "lease" not in path.parts}
    assert after == before


@pytest.mark.slow
def test_a_second_run_in_the_same_directory_is_refused(world, environment, tmp_path):
    run_dir = tmp_path / "run"
    arguments = (world.recipe, "--run-dir", run_dir, "--steps", 100_000)
    first = start("train", *arguments, environment=environment)
    try:
        assert _wait_for((run_dir / "metrics.jsonl").exists, first)
        code, output = finish(start("train", *arguments, environment=environment))
        assert code == 2, output
        assert "Traceback" not in output
        assert str(first.pid) in output
    finally:
        first.kill()
        first.communicate()
