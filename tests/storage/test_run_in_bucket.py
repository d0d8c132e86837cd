"""A run whose directory is in a bucket is the run on a disk, bit for bit, whatever the storage does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from sealion_jax import evaluate, train
from sealion_jax.checkpoint.arrays import leaf_shapes, read_leaf
from sealion_jax.checkpoint.digests import check_digests
from sealion_jax.errors import Preempted
from sealion_jax.stopping import StopRequest
from tests.commands import commands_in_this_process
from tests.storage.gcs import BUCKET, Faults, GcsServer
from tests.tiny_run import TinyWorld, losses_of, make_world, scalars_of

STEPS = 4
OPTIONS = ("--steps", str(STEPS), "--checkpoints.interval-steps", "100")
SAMPLES = ("--samples.prompts", "air", "--samples.max-new-tokens", "4", "--samples.interval-steps", "2")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def on_disk(world: TinyWorld, compiled: Path) -> Path:
    """A run that nothing happened to, on a disk."""
    run_dir = world.folder / "undisturbed"
    with commands_in_this_process(cache=compiled):
        train.main([world.recipe, "--run-dir", str(run_dir), *OPTIONS, *SAMPLES])
    return run_dir


@pytest.fixture(autouse=True)
def left_as_it_was(compiled: Path) -> Iterator[None]:
    with commands_in_this_process(cache=compiled):
        yield


def downloaded(server: GcsServer, name: str, to: Path) -> Path:
    """A folder of the bucket, as a folder of this machine."""
    for path in server.files().find(f"{BUCKET}/{name}"):
        file = to / path.removeprefix(f"{BUCKET}/{name}/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(server.files().cat_file(path))
    return to


def assert_same_state(one: Path, other: Path) -> None:
    """Every array of two steps is the same, bit for bit, and so is what is beside them."""
    for tree in ("params", "optimizer"):
        shapes = leaf_shapes(one, tree=tree)
        assert shapes == leaf_shapes(other, tree=tree) and shapes
        for name in shapes:
            mine, its = (np.asarray(read_leaf(step, name, tree=tree)) for step in (one, other))
            assert mine.tobytes() == its.tobytes(), (tree, name)
    assert json.loads((one / "train.json").read_text()) == json.loads((other / "train.json").read_text())


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the run in this process asked to stop once `step` steps are done."""
    monkeypatch.setattr(StopRequest, "requested", lambda self, moment: moment == step)


def interrupted_run(world: TinyWorld, run_dir: str, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    """Two steps, a stop, and the rest."""
    words = [world.recipe, "--run-dir", run_dir, *OPTIONS, *options]
    with monkeypatch.context() as patched:
        stop_after(2, patched)
        with pytest.raises(Preempted):
            train.main(words)
    train.main(words)


def assert_same_run(server: GcsServer, name: str, on_disk: Path, tmp_path: Path) -> None:
    """What the bucket holds of a run's training is what the disk holds."""
    copy = downloaded(server, name, tmp_path / "copy")
    assert losses_of(copy) == losses_of(on_disk)
    assert [json.loads(line)["step"] for line in (copy / "metrics.jsonl").read_text().splitlines()] == list(
        range(STEPS + 1)
    )
    assert len(list((copy / "tensorboard").glob("events.out.tfevents.*"))) == 1
    assert [step for step, _ in scalars_of(copy / "tensorboard")["loss"]] == list(range(1, STEPS + 1))
    assert json.loads((copy / "summary.json").read_text())["step"] == STEPS
    assert {path.name for path in (copy / "plots").iterdir()} == {
        path.name for path in (on_disk / "plots").iterdir()
    }
    assert check_digests(copy / "checkpoints" / str(STEPS)) == []
    assert_same_state(copy / "checkpoints" / str(STEPS), on_disk / "checkpoints" / str(STEPS))


@pytest.mark.slow
def test_a_run_in_a_bucket_is_the_one_on_a_disk(
    here: GcsServer,
    world: TinyWorld,
    on_disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Stopped and gone on with; another command reads it from there; its last checkpoint is damaged."""
    interrupted_run(world, here.url("plain"), monkeypatch, *SAMPLES)
    assert_same_run(here, "plain", on_disk, tmp_path)
    assert (tmp_path / "copy/samples.jsonl").read_bytes() == (on_disk / "samples.jsonl").read_bytes()
    assert len(list((tmp_path / "copy/tensorboard/samples").glob("events.out.tfevents.*"))) == 1
    scores = []
    for run_dir, output in (
        (on_disk, tmp_path / "scores.json"),
        (here.url("plain"), here.url("scores.json")),
    ):
        evaluate.main([str(run_dir), "--data", world.held_out, "--output", str(output)])
        scores.append(json.loads(epath.Path(output).read_text()) | {"checkpoint": None})
    assert scores[0] == scores[1]

    # A bit of the last checkpoint is flipped, and the run goes on from the one before.
    victim = here.files().find(here.url(f"plain/checkpoints/{STEPS}/params/ocdbt.process_0/d"))[0]
    content = here.files().cat_file(victim)
    here.files().pipe_file(victim, content[:-1] + bytes([content[-1] ^ 1]))
    train.main([world.recipe, "--run-dir", here.url("plain"), *OPTIONS, *SAMPLES])
    told = capsys.readouterr()
    assert f"checkpoint {STEPS} is damaged: gs://{victim}: content changed" in told.err
    assert "resuming after step 2" in told.out
    assert_same_run(here, "plain", on_disk, tmp_path / "again")


@pytest.mark.slow
def test_storage_that_fails_one_request_in_eight(
    here: GcsServer, world: TinyWorld, on_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = Faults(refuse=0.08, reset=0.02, lose_answer=0.02, delay=0.1, delay_seconds=0.2, seed=5)
    with here.faulty(faults) as door:
        for name, value in door.environment().items():
            monkeypatch.setenv(name, value)
        interrupted_run(world, here.url("refused"), monkeypatch)
        befallen = [request.fault for request in door.requests()]
        assert befallen.count("refuse") > 20 and befallen.count("lose_answer") > 2
    for name, value in here.environment().items():
        monkeypatch.setenv(name, value)
    assert_same_run(here, "refused", on_disk, tmp_path)
