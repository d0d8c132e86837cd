"""A damaged checkpoint is told by name and passed over, on a disk and in a bucket alike."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sealion_jax.checkpoint.digests import DIGESTS_FILE
from sealion_jax.checkpoint.orbax import CheckpointConfig, Checkpointer, Restored
from sealion_jax.errors import UserError
from sealion_jax.storage import file_system
from tests.checkpoint.states import abstract_state, assert_same_bits, make_state
from tests.storage.gcs import GcsServer

STEPS = (10, 20)
STATES = {step: make_state("one device", seed=step) for step in STEPS}


@pytest.fixture(params=["disk", "bucket"])
def storage(request: pytest.FixtureRequest, here: GcsServer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder that every test of this kind of storage shares."""
    return here.url("damaged") if request.param == "bucket" else str(tmp_path_factory.getbasetemp())


@pytest.fixture
def run_dir(storage: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A copy of a run that was saved in its place once, and has steps 10 and 20."""
    system, saved = file_system(f"{storage}/saved")
    if not system.exists(saved):
        with Checkpointer(f"{storage}/saved", CheckpointConfig()) as checkpointer:
            for step, (params, optimizer) in STATES.items():
                assets = {"model.json": b"{}", "tokenizer.model": bytes(300)}
                checkpointer.save(step, params=params, optimizer=optimizer, train={}, assets=assets)
    url = f"{storage}/{tmp_path.name}"
    _, copy = file_system(url)
    for path in system.find(saved):
        target = copy + path.removeprefix(saved)
        system.makedirs(target.rpartition("/")[0], exist_ok=True)
        system.cp_file(path, target)
    yield url
    system.rm(copy, recursive=True)


def restored(run_dir: str) -> tuple[Restored | None, str]:
    lines: list[str] = []
    with Checkpointer(run_dir, CheckpointConfig(), report=lines.append) as checkpointer:
        return checkpointer.restore_newest(*abstract_state("one device")), "\n".join(lines)


def data_file(system: Any, step: str) -> str:
    """The largest file of a step's parameters: what an array is in."""
    return max(system.find(f"{step}/params", detail=True).items(), key=lambda item: item[1]["size"])[0]


def remove_file(system: Any, step: str) -> list[str]:
    path = data_file(system, step)
    system.rm_file(path)
    return [f"{path.removeprefix(step)}: missing"]


def truncate(system: Any, step: str) -> list[str]:
    path = data_file(system, step)
    content = system.cat_file(path)
    system.pipe_file(path, content[:-1])
    return [f"{path.removeprefix(step)}: {len(content) - 1} bytes instead of {len(content)}"]


def flip_a_bit(system: Any, step: str) -> list[str]:
    path = data_file(system, step)
    content = bytearray(system.cat_file(path))
    content[len(content) // 2] ^= 1
    system.pipe_file(path, bytes(content))
    return [f"{path.removeprefix(step)}: content changed"]


def empty_a_directory(system: Any, step: str) -> list[str]:
    names = [path.removeprefix(step) for path in system.find(f"{step}/optimizer")]
    for name in names:
        system.rm_file(step + name)
    return [f"{name}: missing" for name in names]


def empty_it_all(system: Any, step: str) -> list[str]:
    """The directory stays: in a bucket as an object of its name, which is how tools make one."""
    for path in system.find(step):
        system.rm_file(path)
    if "file" not in system.protocol:
        system.pipe_file(f"{step}/", b"")
    return [f"{DIGESTS_FILE}: missing"]


def delete_half(system: Any, step: str) -> list[str]:
    """As when somebody's removal is cut short: every other file is gone."""
    gone = [path for path in system.find(step) if not path.endswith(DIGESTS_FILE)][::2]
    for path in gone:
        system.rm_file(path)
    return [f"{path.removeprefix(step)}: missing" for path in gone]


DAMAGES = [remove_file, truncate, flip_a_bit, empty_a_directory, empty_it_all, delete_half]


@pytest.mark.parametrize("harm", DAMAGES, ids=lambda harm: harm.__name__)
def test_it_is_told_and_passed_over(run_dir: str, harm: Any) -> None:
    system, inner = file_system(run_dir)
    told = harm(system, f"{inner}/checkpoints/20")
    found, said = restored(run_dir)
    assert found is not None and found.step == 10
    assert_same_bits((found.params, found.optimizer), STATES[10])
    assert told, "nothing was harmed"
    for problem in told:
        assert f"checkpoint 20 is damaged: {run_dir}/checkpoints/20/{problem.lstrip('/')}" in said
    assert len(said.splitlines()) == len(told)


def test_a_removal_that_was_cut_short_is_passed_over(run_dir: str) -> None:
    """Ours: its first steps are a mark beside the directory, and the end of the digests."""
    system, inner = file_system(run_dir)
    system.pipe_file(f"{inner}/checkpoints/20.unfinished", b"")
    system.rm_file(f"{inner}/checkpoints/20/{DIGESTS_FILE}")
    delete_half(system, f"{inner}/checkpoints/20")
    found, said = restored(run_dir)
    assert found is not None and found.step == 10
    assert said == "checkpoint 20 was not finished when its run ended; passing it over"


def test_all_damaged_is_an_error_and_no_new_start(run_dir: str) -> None:
    system, inner = file_system(run_dir)
    for step, harm in zip(STEPS, (flip_a_bit, empty_it_all), strict=True):
        harm(system, f"{inner}/checkpoints/{step}")
    with pytest.raises(UserError, match=r"none of the checkpoints in .* is good .*20, 10"):
        restored(run_dir)


def test_undamaged_it_is_the_newest(run_dir: str) -> None:
    found, said = restored(run_dir)
    assert found is not None and found.step == 20 and said == ""
    assert_same_bits((found.params, found.optimizer), STATES[20])
