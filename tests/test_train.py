"""Whole runs: what they leave, resuming on other meshes, surviving kills and damage, refusing bad input."""

from __future__ import annotations

import json
import random
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from unittest.mock import Mock

import jax
import numpy as np
import pytest

from sealion_jax import evaluate, preview, recipe, train
from sealion_jax.data.batches import GlobalBatches
from sealion_jax.errors import Preempted, UserError
from sealion_jax.goodput import read_sessions
from sealion_jax.recipe import apply_overrides, load_recipe
from sealion_jax.run import hooks as run_hooks
from sealion_jax.run import runner
from sealion_jax.run.announcements import next_commands
from sealion_jax.run.parts import build
from sealion_jax.training import hooks
from tests.commands import command_environment, commands_in_this_process, start, start_together
from tests.tiny_run import TinyWorld, copy_run, losses_of, make_world, rows_of, scalars_of

STEPS = 12


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> TinyWorld:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """One CPU device, and compiled steps that the commands of this module share."""
    return command_environment(cache=tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("compiled_here")


@pytest.fixture(autouse=True)
def left_as_it_was(compiled):
    """What commands set for their whole process, here pytest's; and compiled steps that they share."""
    with commands_in_this_process(cache=compiled):
        yield


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
    run_dir, _ = undisturbed
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
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["step"], summary["final_loss"]) == (STEPS, rows[-1]["loss"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "microbatches"),
    [({"fsdp": 8}, 1), ({"fsdp": 4, "tensor": 2}, 1), ({"data": 2, "fsdp": 4}, 16)],
    ids=lambda mesh: (
        "-".join(f"{axis}{size}" for axis, size in mesh.items()) if isinstance(mesh, dict) else ""
    ),
)
def test_a_run_goes_on_over_another_mesh(undisturbed, world, tmp_path, mesh, microbatches, capsys):
    """From one device onto eight: the same documents, losses within 1e-5.

    A batch of 16 rows for one device may be in more microbatches than eight have rows for.
    """
    assert len(jax.devices()) == 8
    source, _ = undisturbed
    run_dir = copy_run(source, tmp_path / "run", newest=8)
    axes = [word for axis, size in mesh.items() for word in (f"--mesh.{axis}", str(size))]
    train.main([world.recipe, "--run-dir", str(run_dir), *axes, "--microbatches", str(microbatches)])
    told = (
        "2 microbatches here, and not 16: each of the 8 data x fsdp devices has 2 of 16 rows, and computes 1"
    )
    assert (told in capsys.readouterr().out) == (microbatches == 16)
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
    command = ("train", world.recipe, "--run-dir", run_dir)
    processes = start_together(*command, processes=2, environment=command_environment(devices=2))
    for process in processes:
        code, output = finish(process)
        assert code == 0, output
    expected, found = losses_of(source), losses_of(run_dir)
    after = range(9, STEPS + 1)
    np.testing.assert_allclose([found[s] for s in after], [expected[s] for s in after], rtol=1e-5)
    assert [r["tokens"] for r in rows_of(run_dir)[1:]] == [r["tokens"] for r in rows_of(source)[1:]]


def test_evaluate_agrees_with_the_run(undisturbed, tmp_path, monkeypatch):
    """By the command that the run suggests at its end."""
    source, output = undisturbed
    (suggested,) = (line for line in output.splitlines() if "sealion_jax.evaluate" in line)
    monkeypatch.chdir(tmp_path)
    evaluate.main(shlex.split(suggested)[3:])
    assert jax.config.jax_default_matmul_precision == "highest"
    result = json.loads((tmp_path / "scores.json").read_text())
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


def test_suggested_commands_have_what_is_not_the_default_and_take_any_path(world):
    words = ["--compute.dtype", "bfloat16", "--evaluation.max-documents", "5"]
    config = apply_overrides(load_recipe(world.recipe), words)
    measure, export = (shlex.split(command) for command in next_commands(config, Path("a run's")))
    talk, *others = next_commands(config, Path("a run's"), talks=True)
    against = next_commands(config, Path("a run's"), reference="a base", pairs=["held-out"])
    assert next_commands(config, Path("a run's"), reference="a base") == next_commands(
        config, Path("a run's")
    )
    assert [shlex.split(command)[-4:] for command in against[:1]] == [
        ["--reference", "a base", "--output", "scores.json"]
    ]
    assert [shlex.split(command) for command in others] == [measure, export]
    assert shlex.split(talk) == ["python", "-m", "sealion_jax.generate", "a run's"]
    assert measure[2:] == [
        *["sealion_jax.evaluate", "a run's", "--data", world.held_out, "--context-tokens", "32"],
        *["--max-documents", "5", "--dtype", "bfloat16", "--output", "scores.json"],
    ]
    assert export[2:] == ["sealion_jax.convert", "to-hf", "a run's", "a run's/hf"]


def test_hooks_record_then_save_then_draw(world):
    parts = build(load_recipe(world.recipe))
    chosen = run_hooks.assemble(
        parts,
        plots=Path("plots"),
        output=(Mock(), Mock(), None),
        sync=Mock(),
        save=Mock(),
        checkpointer=Mock(),
        stop=Mock(),
        show_batch=Mock(),
        profile=None,
        activity=Mock(),
        ledger=Mock(),
    )
    order = [hooks.CountSkipped, hooks.Evaluate, hooks.Record, hooks.GuardNonFinite, hooks.Save, hooks.Plot]
    assert [type(hook) for hook in chosen] == [
        hooks.NoteStep,
        hooks.Goodput,
        hooks.Throughput,
        *order,
        hooks.Stop,
    ]


def test_the_batch_of_a_loss_that_is_not_finite_can_be_looked_at(world, capsys):
    """The command that is told shows the documents that are told, also where data is overridden."""
    words = [world.recipe, "--data.seed", "3"]
    parts = build(apply_overrides(load_recipe(world.recipe), words[1:]))
    batches = GlobalBatches(parts.mixture, global_batch_size=16)
    note = run_hooks.batch_note(batches, 4, command=words, run_dir=Path("run"))
    assert note.startswith(batches.describe(4))
    preview.main(shlex.split(note.splitlines()[-1])[3:])
    shown = capsys.readouterr().out
    assert "step 4" in shown
    for row in range(16):
        for span in batches.documents(4, row).spans:
            assert f"document {span.document}" in shown
    skipping = run_hooks.batch_note(batches.with_skip(2, 1), 4, command=words, run_dir=Path("a run"))
    assert shlex.split(skipping.splitlines()[-1])[-4:] == ["--step", "4", "--run-dir", "a run"]


@pytest.mark.parametrize("place", ["load_and_override", "begin"])
def test_asked_to_stop_while_it_starts(world, tmp_path, monkeypatch, place):
    """The first thing of all, and the last before training."""
    module = recipe if place == "load_and_override" else runner
    real = getattr(module, place)

    def with_signal(*arguments, **options):
        signal.raise_signal(signal.SIGTERM)
        # What is begun takes seconds to make, and must not be looked at any more.
        return None if place == "begin" else real(*arguments, **options)

    monkeypatch.setattr(module, place, with_signal)
    with pytest.raises(Preempted, match="before training began; run me again"):
        train.main([world.recipe, "--run-dir", str(tmp_path / "run")])
    assert jax.config.jax_default_matmul_precision == "highest"
    assert not (tmp_path / "run" / "config.json").exists()
    # The account of the time knows of it as soon as the run directory is its own.
    assert [session.reached for session in read_sessions(tmp_path / "run")] == [()] * (place == "begin")


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


def _kept_json(run_dir):
    """The JSON files of a run that tell of what it trained, and not of who runs it."""
    return [path for path in run_dir.rglob("*.json*") if not {"lease", "heartbeats"} & set(path.parts)]


def test_a_run_directory_of_another_recipe_is_refused(undisturbed, world, tmp_path, capsys):
    source, _ = undisturbed
    run_dir = copy_run(source, tmp_path / "run", newest=8)
    before = {path: path.read_bytes() for path in _kept_json(run_dir)}
    _refused([world.recipe, "--run-dir", run_dir, "--model.feed-forward-dim", 96], "feed_forward_dim")
    _refused([world.recipe, "--run-dir", run_dir, "--global-batch-size", 8], "global_batch_size")
    _refused([world.recipe, "--run-dir", run_dir, "--steps", 6], "steps is 6, but this run has done 8")
    train.main([world.recipe, "--run-dir", str(run_dir), "--steps", "8"])
    assert "nothing to do" in capsys.readouterr().out
    after = {path: path.read_bytes() for path in _kept_json(run_dir)}
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
