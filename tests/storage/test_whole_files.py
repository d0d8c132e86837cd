"""Files of a disk are there with all their content or not at all; a torn line spoils no other."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from sealion_jax.data import files
from sealion_jax.data.files import copy_whole
from sealion_jax.storage import add_line, create, read_lines, write_whole


@pytest.mark.parametrize("write", [write_whole, create])
def test_a_full_disk_leaves_nothing(write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "file", b"content")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("links", [True, False])
def test_only_the_first_creates(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the file system has no second names for a file, as some that speak to a network."""

    def none(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    if not links:
        monkeypatch.setattr(os, "link", none)
    create(tmp_path / "folder" / "file", b"first")
    with pytest.raises(FileExistsError):
        create(tmp_path / "folder" / "file", b"second")
    assert [path.read_bytes() for path in (tmp_path / "folder").iterdir()] == [b"first"]


@pytest.mark.parametrize("write", [write_whole, create])
def test_the_name_is_synced_too(write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[bool, bool]] = []

    def note(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        synced.append((is_folder, (tmp_path / "file").exists()))

    monkeypatch.setattr(os, "fsync", note)
    write(tmp_path / "file", b"content", synced=False)
    assert synced == []
    (tmp_path / "file").unlink()
    write(tmp_path / "file", b"content")
    assert synced == [(False, False), (True, True)]


def test_a_torn_line_is_left_out_and_what_follows_it_is_not(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"n": 1}\n[2]\n\xff\n{"n": "\xe2\x80\xa8"}\n{"n": 4')
    assert read_lines(path) == [{"n": 1}, {"n": "\u2028"}]
    add_line(path, {"n": 5})
    assert read_lines(path) == [{"n": 1}, {"n": "\u2028"}, {"n": 5}]


def test_two_that_copy_to_one_place_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is at half of it when the other is done; then its disk is full."""
    one, two, target = tmp_path / "one", tmp_path / "two", tmp_path / "below" / "target"
    one.write_bytes(b"one")
    two.write_bytes(b"two")

    def half(_: Path, aside: Path) -> None:
        monkeypatch.undo()
        aside.write_bytes(b"o")
        copy_whole(two, str(target))
        assert (aside.read_bytes(), target.read_bytes()) == (b"o", b"two")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.shutil, "copyfile", half)
    with pytest.raises(OSError, match="No space left"):
        copy_whole(one, str(target))
    assert [path.read_bytes() for path in target.parent.iterdir()] == [b"two"]
