"""A run directory that cannot be written is told first of all, in one line, with exit code 2."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sealion_jax import storage, train
from sealion_jax.cli import EXIT_USER_ERROR
from sealion_jax.errors import UserError
from sealion_jax.run import probing, runner
from sealion_jax.run.probing import require_writable_by_all
from sealion_jax.storage import require_writable, writable
from tests.commands import command_environment, commands_in_this_process, free_port, start
from tests.storage.gcs import Faults, GcsServer


@pytest.fixture(autouse=True)
def left_as_it_was() -> Iterator[None]:
    with commands_in_this_process():
        yield


def through(door_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in door_environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        (Faults(read_only=True), r"cannot be written: 403, .*roles/storage.objectUser"),
        (Faults(no_account=True), r"cannot be written: 401, .*gcloud auth application-default login"),
    ],
    ids=["read only", "no account"],
)
def test_a_bucket_that_refuses(
    here: GcsServer, monkeypatch: pytest.MonkeyPatch, faults: Faults, said: str
) -> None:
    """Told within seconds, with one request that was refused, and before any part of the run is built."""
    monkeypatch.setattr(runner, "build", lambda *_, **__: pytest.fail("the run was built"))
    with here.faulty(faults) as door:
        through(door.environment(), monkeypatch)
        began = time.monotonic()
        with pytest.raises(UserError, match=said):
            train.main(["--run-dir", here.url("run")])
        assert time.monotonic() - began < 10
        assert len(door.requests()) <= 2, "an error that stays is not tried again"


def test_no_such_bucket(here: GcsServer) -> None:
    with pytest.raises(UserError, match="gs://nowhere/run cannot be written: there is no bucket nowhere"):
        train.main(["--run-dir", "gs://nowhere/run"])


def test_a_server_that_does_not_answer(here: GcsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with here.faulty(Faults(delay=1.0, delay_seconds=8)) as door:
        through(door.environment(), monkeypatch)
        began = time.monotonic()
        with pytest.raises(UserError, match="no answer within 1 s"):
            require_writable(here.url("unanswered"), limit_seconds=1)
        assert time.monotonic() - began < 5


def test_nothing_of_the_probe_is_left(here: GcsServer, tmp_path: Path) -> None:
    require_writable(here.url("probed"))
    require_writable(str(tmp_path / "new" / "run"))
    assert here.files().find(here.url("probed")) == []
    assert list(tmp_path.iterdir()) == []


def test_storage_that_reads_back_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = storage.write_whole
    monkeypatch.setattr(storage, "write_whole", lambda path, content: before(path, content[:-1]))
    with pytest.raises(UserError, match="what was written is not what is read back"):
        require_writable(str(tmp_path))


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in ("file", "file/run"):
        with pytest.raises(UserError, match=rf"{place} cannot be written: a file is in the way"):
            train.main(["--run-dir", str(tmp_path / place)])


@pytest.mark.parametrize("url", ["gs://", "gs:///"])
def test_a_url_without_a_bucket(url: str) -> None:
    with pytest.raises(UserError, match="names no bucket; give gs://bucket/folder"):
        require_writable(url)


def test_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        require_writable(str(tmp_path))


@pytest.mark.slow
def test_all_processes_of_the_command_end_with_2(here: GcsServer) -> None:
    """Each asks, and all are told of the one that may not write there."""
    with here.faulty(Faults(read_only=True)) as door:
        together = ["--coordinator-address", f"127.0.0.1:{free_port()}", "--num-processes", 2]
        processes = [
            start("train", "--run-dir", here.url("run"), *together, "--process-id", number, environment=own)
            for number, own in enumerate((command_environment(), command_environment() | door.environment()))
        ]
        outputs = [process.communicate(timeout=150)[0] for process in processes]
        assert len(door.requests()) <= 2
    assert [process.returncode for process in processes] == [EXIT_USER_ERROR] * 2, outputs
    for output in outputs:
        assert "Traceback" not in output
        told = rf"error: process 1 on \S+: {here.url('run')} cannot be written: 403, "
        assert re.match(told, output.splitlines()[-1]), output
    assert here.files().find(here.url("run")) == []


def test_folders_that_were_made_stay_while_others_may_probe(tmp_path: Path) -> None:
    run_dir = tmp_path / "new" / "run"
    with writable(str(run_dir)):
        with writable(str(run_dir)):
            pass
        assert list(run_dir.iterdir()) == []
    assert list(tmp_path.iterdir()) == []
    with writable(str(run_dir)):
        (run_dir / "begun").write_text("")
    assert (run_dir / "begun").exists()


def test_the_processes_that_cannot_write_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As process 0 of twelve hears of the others."""
    problems = [f"process {number} on node: no" for number in range(1, 12)]
    monkeypatch.setattr(probing, "all_lines", lambda own: [*own, *problems])
    with pytest.raises(UserError) as raised:
        require_writable_by_all(str(tmp_path))
    assert str(raised.value).splitlines() == [*problems[:8], "and 3 more processes"]
