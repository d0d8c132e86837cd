"""State comes back bit for bit, onto any mesh; damage is named and the step before is used."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sealion_jax.checkpoint import orbax as ours
from sealion_jax.checkpoint import sealing
from sealion_jax.checkpoint.layout import StepDirectories, asset_paths, read_assets
from sealion_jax.checkpoint.lease import LeaseLostError, RunLease
from sealion_jax.checkpoint.orbax import CheckpointConfig, Checkpointer, Restored
from sealion_jax.checkpoint.trees import load_params
from sealion_jax.errors import UserError
from tests.checkpoint.states import abstract_state, assert_same_bits, make_state

ASSETS = {"model.json": b'{"vocab_size": 64}', "tokenizer.model": bytes(300), "source/config.json": b"{}"}

State = tuple[Any, Any]


def _save(run_dir: Path, states: dict[int, State], config: CheckpointConfig | None = None) -> None:
    with Checkpointer(run_dir, config or CheckpointConfig()) as checkpointer:
        for step, (params, optimizer) in states.items():
            train = {"skips": [[3, 2]], "counters": {"tokens": 10 * step}}
            checkpointer.save(step, params=params, optimizer=optimizer, train=train, assets=ASSETS)


def _restore(run_dir: Path, abstract: State) -> tuple[Restored | None, list[str]]:
    lines: list[str] = []
    with Checkpointer(run_dir, CheckpointConfig(), report=lines.append) as checkpointer:
        return checkpointer.restore_newest(*abstract), lines


@pytest.fixture(scope="module")
def states() -> dict[int, State]:
    return {step: make_state("fsdp 4 x tensor 2", seed=step) for step in (10, 20)}


@pytest.fixture(scope="module")
def saved(states: dict[int, State], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with steps 10 and 20; tests that change it take a copy."""
    run_dir = tmp_path_factory.mktemp("saved")
    _save(run_dir, states)
    return run_dir


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


@pytest.mark.parametrize("mesh_name", ["fsdp 8", "fsdp 4 x tensor 2", "data 2 x fsdp 4", "one device"])
def test_restores_bit_for_bit_onto_any_mesh(
    mesh_name: str,
    saved: Path,
    states: dict[int, State],
) -> None:
    abstract = abstract_state(mesh_name)
    restored, lines = _restore(saved, abstract)
    assert restored is not None and lines == []
    assert restored.step == 20
    assert restored.train == {"skips": [[3, 2]], "counters": {"tokens": 200}, "step": 20}
    state = (restored.params, restored.optimizer)
    assert_same_bits(state, states[20])
    assert [leaf.sharding for leaf in jax.tree.leaves(state)] == [
        leaf.sharding for leaf in jax.tree.leaves(abstract)
    ]


def test_saved_from_any_mesh_gives_the_same_arrays(tmp_path: Path) -> None:
    """Replicated arrays too: over the data axis every array is there twice."""
    state = make_state("data 2 x fsdp 4", seed=20)
    _save(tmp_path, {20: state})
    restored, _ = _restore(tmp_path, abstract_state("one device"))
    assert restored is not None
    assert_same_bits((restored.params, restored.optimizer), state)


def test_a_step_stands_alone(saved: Path, tmp_path: Path, states: Any) -> None:
    step_dir = Path(shutil.copytree(saved / "checkpoints" / "20", tmp_path / "elsewhere"))
    assert read_assets(step_dir) == ASSETS
    loaded = load_params(step_dir, abstract_state("fsdp 8")[0])
    np.testing.assert_array_equal(
        np.asarray(loaded["embedder"]["embedding"]), np.asarray(states[20][0]["embedder"]["embedding"])
    )


def test_weights_are_converted_to_the_dtype_wanted(saved: Path, states: Any) -> None:
    abstract, _ = abstract_state("fsdp 8")
    wanted = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, "float32", sharding=s.sharding), abstract)
    loaded = load_params(saved / "checkpoints" / "20", wanted)
    down = loaded["blocks"]["layer_0"]["mlp"]["down"]
    assert down.dtype == np.float32
    np.testing.assert_array_equal(
        np.asarray(down), np.asarray(states[20][0]["blocks"]["layer_0"]["mlp"]["down"]).astype(np.float32)
    )


def _largest_file(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0b1000
    path.write_bytes(content)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {
    "flipped bit": (_flip_a_bit, "content changed"),
    "truncated": (_truncate, "bytes instead of"),
    "missing": (Path.unlink, "missing"),
}


@pytest.mark.parametrize("place", ["params", "optimizer", "train.json", "assets"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_step_before_used(damage: str, place: str, copy: Path, states: Any) -> None:
    where = copy / "checkpoints" / "20" / place
    file = where if where.is_file() else _largest_file(where)
    harm, words = DAMAGES[damage]
    harm(file)
    restored, lines = _restore(copy, abstract_state("fsdp 8"))
    assert restored is not None and restored.step == 10
    assert restored.train["counters"] == {"tokens": 100}
    assert_same_bits((restored.params, restored.optimizer), states[10])
    assert len(lines) == 1
    assert lines[0].startswith(f"checkpoint 20 is damaged: {file}: ") and words in lines[0]


@pytest.mark.parametrize("place", ["", "params", "optimizer", "assets"])
def test_an_emptied_directory_is_damage(place: str, copy: Path) -> None:
    where = copy / "checkpoints" / "20" / place
    shutil.rmtree(where)
    where.mkdir()
    restored, lines = _restore(copy, abstract_state("fsdp 8"))
    assert restored is not None and restored.step == 10
    assert lines and all(
        f"checkpoint 20 is damaged: {where}/" in line and "missing" in line for line in lines
    )


def test_lost_digests_are_damage(copy: Path) -> None:
    (copy / "checkpoints" / "20" / "digests.json").unlink()
    restored, lines = _restore(copy, abstract_state("fsdp 8"))
    assert restored is not None and restored.step == 10
    assert lines == [f"checkpoint 20 is damaged: {copy}/checkpoints/20/digests.json: missing"]


def test_an_unfinished_step_is_passed_over_and_cleaned_away(copy: Path, states: Any) -> None:
    """What SIGKILL leaves: no digests, the mark beside it, Orbax's temporary directory of another step."""
    checkpoints = copy / "checkpoints"
    (checkpoints / "20" / "digests.json").unlink()
    (checkpoints / "20.unfinished").touch()
    (checkpoints / "30.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    (checkpoints / "30.unfinished").touch()
    (checkpoints / "notes").mkdir()
    restored, lines = _restore(copy, abstract_state("fsdp 8"))
    assert restored is not None and restored.step == 10
    assert lines == ["checkpoint 20 was not finished when its run ended; passing it over"]
    _save(copy, {40: states[20]})
    assert sorted(path.name for path in checkpoints.iterdir()) == ["10", "40", "notes"]


def test_steps_that_are_all_damaged_are_an_error_not_a_new_start(copy: Path) -> None:
    for step in ("10", "20"):
        _flip_a_bit(_largest_file(copy / "checkpoints" / step / "params"))
    with pytest.raises(UserError, match=r"none of the checkpoints in .* is good \(see above for 20, 10\)"):
        _restore(copy, abstract_state("fsdp 8"))


def test_nothing_saved_yet_is_a_new_start(tmp_path: Path) -> None:
    """No directory; and one whose run was killed during its first save."""
    assert _restore(tmp_path / "new", abstract_state("one device")) == (None, [])
    directories = StepDirectories(tmp_path / "killed")
    directories.begin(10)
    directories[10].mkdir()
    restored, lines = _restore(tmp_path / "killed", abstract_state("one device"))
    assert restored is None
    assert lines == ["checkpoint 10 was not finished when its run ended; passing it over"]


def _number_of_files(step: Path) -> int:
    """Those that digests are over."""
    return len(json.loads((step / "digests.json").read_text())["files"])


def test_going_on_after_damage_replaces_it(copy: Path, states: Any) -> None:
    _flip_a_bit(_largest_file(copy / "checkpoints" / "20"))
    config = CheckpointConfig(keep_last=2)  # good ones: the damaged one does not count
    moves: list[None] = []
    with Checkpointer(
        copy, config, on_progress=lambda: moves.append(None), report=lambda line: None
    ) as checkpointer:
        restored = checkpointer.restore_newest(*abstract_state("fsdp 8"))
        assert restored is not None and restored.step == checkpointer.newest == 10
        assert len(moves) == 2 + sum(_number_of_files(copy / "checkpoints" / step) for step in ("10", "20"))
        params, optimizer = states[20]
        checkpointer.save(15, params=params, optimizer=optimizer, train={}, assets=ASSETS)
    assert StepDirectories(copy).steps() == [10, 15]
    restored, lines = _restore(copy, abstract_state("fsdp 8"))
    assert restored is not None and (restored.step, lines) == (15, [])


@pytest.mark.parametrize("num_devices", [1, 8])
def test_donated_buffers_are_saved_as_they_were(num_devices: int, tmp_path: Path) -> None:
    """On CPUs the host's copy of an array is the array itself: it must not be reused before it is on disk."""
    mesh = Mesh(np.array(jax.devices()[:num_devices]), ("fsdp",))
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    expected = np.random.default_rng(0).normal(size=(64, 2**17)).astype(np.float32)
    abstract = {"embedder": jax.ShapeDtypeStruct(expected.shape, expected.dtype, sharding=sharding)}
    fresh = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 0, tree))
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * -2, tree), donate_argnums=0)
    original = {"embedder": jax.device_put(expected, sharding)}
    jax.block_until_ready(overwrite(fresh(original)))  # compiled

    for attempt in range(5):
        params = fresh(original)
        run_dir = tmp_path / str(attempt)
        with Checkpointer(run_dir, CheckpointConfig()) as checkpointer:
            checkpointer.save(1, params=params, optimizer=fresh(original), train={}, assets={})
            params = jax.block_until_ready(overwrite(params))
            was_under_way = StepDirectories(run_dir).steps() == []
            for _ in range(3):
                params = overwrite(params)
            jax.block_until_ready(params)
        loaded = load_params(run_dir / "checkpoints" / "1", abstract)
        np.testing.assert_array_equal(np.asarray(loaded["embedder"]), expected)
        if was_under_way:
            return
    pytest.fail("every save was over before the arrays were overwritten: make them larger")


def test_saving_goes_on_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params, optimizer = make_state("one device", seed=1)
    measure = sealing.measure
    monkeypatch.setattr(sealing, "measure", lambda *args: (time.sleep(0.5), measure(*args))[1])
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        checkpointer.save(1, params=params, optimizer=optimizer, train={}, assets={})
        checkpointer.check()
        assert checkpointer.newest is None
        assert StepDirectories(tmp_path).complete() == []
        checkpointer.wait()
        assert checkpointer.newest == 1
    assert StepDirectories(tmp_path).complete() == [1]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_a_complete_step_is_not_saved_again(saved: Path, states: Any) -> None:
    before = (saved / "checkpoints" / "20" / "digests.json").stat().st_mtime_ns
    with Checkpointer(saved, CheckpointConfig()) as checkpointer:
        checkpointer.restore_newest(*abstract_state("fsdp 8"))
        checkpointer.save(20, params=states[20][0], optimizer=states[20][1], train={}, assets={})
    assert (saved / "checkpoints" / "20" / "digests.json").stat().st_mtime_ns == before


def test_a_background_error_reaches_the_main_thread_and_leaves_nothing(
    copy: Path, states: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: epath.Path, *_: Any, **__: Any) -> None:
        raise PermissionError(f"no digests for {folder}")

    monkeypatch.setattr(sealing, "write_manifest", fail)
    checkpointer = Checkpointer(copy, CheckpointConfig())
    checkpointer.save(30, params=states[20][0], optimizer=states[20][1], train={}, assets={})
    deadline = time.monotonic() + 30
    with pytest.raises(PermissionError, match="no digests"):
        while time.monotonic() < deadline:
            checkpointer.check()
            time.sleep(0.01)
    checkpointer.close()
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == ["10", "20"]


def test_an_error_reaches_the_main_thread_though_its_explanation_fails(
    copy: Path, states: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The storage is out of reach: the save fails, and so does what would be asked about the failure."""

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no way to the bucket")

    with RunLease(copy, heartbeat_seconds=3600) as lease:
        checkpointer = Checkpointer(copy, CheckpointConfig(), lease=lease)
        monkeypatch.setattr(ours, "write_assets", fail)
        checkpointer.save(30, params=states[20][0], optimizer=states[20][1], train={}, assets={})
        monkeypatch.setattr(lease, "check", fail)
        monkeypatch.setattr(ours, "no_room_error", fail)
        with pytest.raises(ConnectionError, match="no way"):
            checkpointer.close()
    assert StepDirectories(copy).complete() == [10, 20]


def test_whoever_was_taken_over_while_hashing_leaves_the_new_digests_alone(
    copy: Path, states: Any, monkeypatch: Any
) -> None:
    params, optimizer = states[20]
    digests = copy / "checkpoints" / "30" / "digests.json"
    with RunLease(copy, heartbeat_seconds=3600) as lease:
        checkpointer = Checkpointer(copy, CheckpointConfig(), lease=lease)
        measured = sealing.measure

        def take_over(*args: Any) -> Any:
            found = measured(*args)
            own = (copy / "lease" / "00000001.json").read_text()
            (copy / "lease" / "00000002.json").write_text(own.replace('"token": 1', '"token": 2'))
            digests.write_text("the new holder's")
            return found

        monkeypatch.setattr(sealing, "measure", take_over)
        checkpointer.save(30, params=params, optimizer=optimizer, train={}, assets={})
        with pytest.raises(LeaseLostError, match="was taken over"):
            checkpointer.close()
    assert digests.read_text() == "the new holder's"


def test_going_back_before_the_first_save_is_a_new_beginning(copy: Path, states: Any) -> None:
    abstract = abstract_state("fsdp 8")
    with Checkpointer(copy, CheckpointConfig(interval_steps=10)) as checkpointer:
        with pytest.raises(UserError, match="no checkpoint of step 10 or before is left"):
            shutil.rmtree(copy / "checkpoints" / "10")
            checkpointer.go_back(*abstract, at_most=10)
        assert StepDirectories(copy).complete() == [20]
        assert checkpointer.go_back(*abstract, at_most=9) is None
    assert StepDirectories(copy).complete() == []


def test_a_run_that_was_taken_over_commits_nothing(copy: Path, states: Any, monkeypatch: Any) -> None:
    """The lease is lost while the arrays are being written; the other run's directory is left alone."""
    params, optimizer = states[20]
    with RunLease(copy, heartbeat_seconds=3600) as lease:
        checkpointer = Checkpointer(copy, CheckpointConfig(), lease=lease)
        checkpointer.save(30, params=params, optimizer=optimizer, train={}, assets={})
        checkpointer.wait()
        written = ours.write_assets

        def take_over(*args: Any, **kwargs: Any) -> None:
            written(*args, **kwargs)
            (copy / "lease" / "00000002.json").write_text(
                (copy / "lease" / "00000001.json").read_text().replace('"token": 1', '"token": 2')
            )

        monkeypatch.setattr(ours, "write_assets", take_over)
        checkpointer.save(40, params=params, optimizer=optimizer, train={}, assets={})
        with pytest.raises(LeaseLostError, match="was taken over"):
            checkpointer.wait()
        with pytest.raises(LeaseLostError):
            checkpointer.save(50, params=params, optimizer=optimizer, train={}, assets={})
        checkpointer.close()
    directories = StepDirectories(copy)
    assert directories.complete() == [10, 20, 30]
    assert directories.is_unfinished(40)


def test_another_models_checkpoint_is_refused_with_names(saved: Path) -> None:
    params, optimizer = abstract_state("one device")
    smaller = dict(params)
    del smaller["rest"]
    with pytest.raises(UserError, match=r"does not fit .*rest/layer_0/mlp/gate is not expected"):
        _restore(saved, (smaller, optimizer))
    wider = jax.tree.map(lambda leaf: leaf, params)
    wider["final_norm"]["scale"] = jax.ShapeDtypeStruct((32,), np.float32)
    with pytest.raises(UserError, match=r"final_norm/scale has shape \[16\] instead of \[32\]"):
        _restore(saved, (wider, optimizer))
    other = jax.tree.map(lambda leaf: leaf, params)
    other["final_norm"]["scale"] = jax.ShapeDtypeStruct((16,), np.float16)
    with pytest.raises(UserError, match="final_norm/scale is float32 instead of float16"):
        _restore(saved, (other, optimizer))
    with pytest.raises(UserError, match=r"optimizer does not fit .*1/0/mu/.* is not expected"):
        _restore(saved, (params, (optimizer[0],)))


def test_the_keep_policy_keeps_the_newest_and_the_multiples(tmp_path: Path) -> None:
    state = make_state("one device", seed=1)
    config = CheckpointConfig(keep_last=2, keep_every_steps=4)
    _save(tmp_path, dict.fromkeys(range(1, 8), state), config)
    assert StepDirectories(tmp_path).complete() == StepDirectories(tmp_path).steps() == [4, 6, 7]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "6", "7"]


def test_old_steps_go_only_after_the_newer_one_is_complete(
    copy: Path, states: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    measure = sealing.measure
    monkeypatch.setattr(
        sealing, "measure", lambda *args: (seen.append(StepDirectories(copy).complete()), measure(*args))[1]
    )
    _save(copy, {30: states[20]}, CheckpointConfig(keep_last=1))
    assert seen == [[10, 20]]
    assert StepDirectories(copy).complete() == [30]


def test_the_step_just_saved_stays_even_below_others(copy: Path, states: Any) -> None:
    _save(copy, {5: states[20]}, CheckpointConfig(keep_last=1))
    assert StepDirectories(copy).complete() == [5, 20]


@pytest.mark.parametrize("field", ["interval_steps", "keep_last", "keep_every_steps"])
def test_config_refuses_nonsense(field: str) -> None:
    with pytest.raises(UserError, match=f"checkpoints.{field} must be at least 1, not 0"):
        CheckpointConfig(**{field: 0})


def test_due_steps() -> None:
    config = CheckpointConfig(interval_steps=5)
    assert [step for step in range(12) if config.is_due(step)] == [5, 10]


def test_assets_may_be_files_and_outlive_their_source(tmp_path: Path, saved: Path) -> None:
    """Tensors carried through untouched come as a path, into a checkpoint that may be deleted meanwhile."""
    params, optimizer = make_state("one device", seed=1)
    source = tmp_path / "vision.safetensors"
    source.write_bytes(bytes(range(200)))
    assets = {"source/vision.safetensors": epath.Path(source), "model.json": b"{}"}
    with Checkpointer(tmp_path / "run", CheckpointConfig()) as checkpointer:
        checkpointer.save(1, params=params, optimizer=optimizer, train={}, assets=assets)
        checkpointer.wait()
        source.unlink()
        checkpointer.save(2, params=params, optimizer=optimizer, train={}, assets=assets)
    step_dir = tmp_path / "run" / "checkpoints" / "2"
    assert asset_paths(step_dir)["source/vision.safetensors"].read_bytes() == bytes(range(200))
    assert read_assets(step_dir) == {"model.json": b"{}"}
    names = json.loads((step_dir / "digests.json").read_text())["files"]
    assert "assets/source/vision.safetensors" in names
    with pytest.raises(ValueError, match="relative path"), Checkpointer(saved, CheckpointConfig()) as other:
        other.save(30, params=params, optimizer=optimizer, train={}, assets={"../../x": b""})
