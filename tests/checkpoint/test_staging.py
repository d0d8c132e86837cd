"""A directory that appears whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from etils import epath

from sealion_jax.checkpoint import staging
from sealion_jax.checkpoint.staging import new_directory
from sealion_jax.errors import UserError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("is_there", [False, True])
def test_it_has_its_name_only_at_the_end(is_there: bool, tmp_path: Path) -> None:
    target = tmp_path / "a" / "target"
    if is_there:
        target.mkdir(parents=True)
    with new_directory(target) as place:
        (place / "file").write_text("x")
        assert not target.exists() or not names(target)
    assert (target / "file").read_text() == "x"
    assert names(tmp_path / "a") == ["target"]


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), UserError("y")])
def test_nothing_is_left_of_a_failure(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)), new_directory(tmp_path / "target") as place:
        (place / "file").write_text("x")
        raise error
    assert names(tmp_path) == []


def test_a_full_disk_is_the_user_s_to_solve(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"writing .*target failed: No space left on device") as caught:  # noqa: SIM117
        with new_directory(tmp_path / "target"):
            raise RuntimeError("inner") from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert str(tmp_path) in str(caught.value)
    assert names(tmp_path) == []


def test_too_little_room_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"GB free, this takes 1000000000000.0 GB"),
        new_directory(tmp_path / "target", needs_bytes=10**21),
    ):
        raise AssertionError("was entered")
    assert names(tmp_path) == []


def test_what_is_there_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    for target in (tmp_path, tmp_path / "kept"):
        with pytest.raises(UserError, match="exists and is not empty"), new_directory(target):
            raise AssertionError("was entered")
    assert (tmp_path / "kept").read_text() == "mine"


def test_what_a_killed_process_left_is_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stem = staging._stem(epath.Path(tmp_path / "target"))
    dead, alive, other = (f"{stem}{number}" for number in ("999999999", str(os.getppid()), "x"))
    for name in (dead, alive, other):
        (tmp_path / name).mkdir()
    with new_directory(tmp_path / "target"):
        pass
    assert names(tmp_path) == sorted([alive, other, "target"])
    assert f"removing {tmp_path / dead}, left by a process that was killed" in capsys.readouterr().err
