"""Blocks of stores in buckets are fetched once, checked whenever they are read first, and bounded."""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest

from sealion_jax.data.store import cache as store_cache
from sealion_jax.data.store.cache import CacheConfig, CachedFile, Room
from sealion_jax.data.store.manifest import StoredFile
from sealion_jax.errors import UserError

CONTENT = np.random.default_rng(0).bytes(10_000)
BLOCK = 1024


@pytest.fixture
def path() -> str:
    """A file of fsspec's in-memory file system, which stands for a bucket."""
    url = f"memory://{uuid.uuid4().hex}/file"
    write(url, CONTENT)
    return url


def write(url: str, content: bytes) -> None:
    system, name = fsspec.core.url_to_fs(url)
    system.pipe_file(name, content)


def opened(path: str, folder: Path, *, content: bytes = CONTENT, limit: float | None = None) -> CachedFile:
    stored = StoredFile(name="file", bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    room = Room(CacheConfig(folder=str(folder), most_gigabytes=limit))
    return CachedFile(path, stored, room, block_bytes=BLOCK)


def kept(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*/*") if file.name != "whole")


def test_blocks_are_fetched_once_and_only_those_needed(path: str, tmp_path: Path) -> None:
    blocks = opened(path, tmp_path)
    assert blocks.read(3000, 3100) == CONTENT[3000:3100]
    assert blocks.fetched_bytes == 2 * BLOCK  # the range crosses from the third block into the fourth
    assert blocks.read(2048, 4096) == CONTENT[2048:4096]
    assert blocks.read(2049, 4095) == CONTENT[2049:4095]
    assert blocks.read(7, 7) == b""
    assert blocks.fetched_bytes == 2 * BLOCK
    assert blocks.read(9999, 10_000) == CONTENT[9999:]
    assert blocks.fetched_bytes == 2 * BLOCK + 10_000 - 9 * BLOCK
    again = opened(path, tmp_path)
    assert again.read(2048, 4096) == CONTENT[2048:4096]
    assert again.fetched_bytes == 0, "another reader finds them on the disk"
    with pytest.raises(ValueError, match="are not inside"):
        again.read(9999, 10_001)


@pytest.mark.parametrize("harm", ["flipped", "cut short", "gone"])
def test_a_block_that_is_damaged_here_is_fetched_again(path: str, tmp_path: Path, harm: str) -> None:
    opened(path, tmp_path).read_all()
    victim = kept(tmp_path)[3]
    if harm == "gone":
        victim.unlink()
    else:
        whole = victim.read_bytes()
        victim.write_bytes(whole[:-1] if harm == "cut short" else bytes([whole[0] ^ 1]) + whole[1:])
    again = opened(path, tmp_path)
    assert again.read_all() == CONTENT
    assert again.fetched_bytes == BLOCK
    assert opened(path, tmp_path).read_all() == CONTENT


def test_a_block_that_goes_while_it_is_in_use_is_fetched_again(path: str, tmp_path: Path) -> None:
    blocks = opened(path, tmp_path)
    assert blocks.read(0, 10) == CONTENT[:10]
    kept(tmp_path)[0].unlink()
    assert blocks.read(0, 10) == CONTENT[:10]
    assert blocks.fetched_bytes == 2 * BLOCK


def test_a_file_that_is_not_the_manifest_s_is_told(path: str, tmp_path: Path) -> None:
    """Of the right size, but with other bytes; nothing of it stays."""
    write(path, CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))
    with pytest.raises(UserError, match="has other bytes than its manifest says"):
        opened(path, tmp_path).read_all()
    assert kept(tmp_path) == []


def test_a_store_prepared_anew_has_nothing_of_the_old_one(path: str, tmp_path: Path) -> None:
    opened(path, tmp_path).read_all()
    other = CONTENT[::-1]
    write(path, other)
    assert opened(path, tmp_path, content=other).read_all() == other


def test_no_more_is_kept_than_allowed(path: str, tmp_path: Path) -> None:
    """Of what is kept everything is of use later; the rest is read each time."""
    limit = 4.5 * BLOCK / 1e9
    assert opened(path, tmp_path, limit=limit).read_all() == CONTENT
    assert len(kept(tmp_path)) == 4
    again = opened(path, tmp_path, limit=limit)
    assert again.read_all() == CONTENT
    assert again.fetched_bytes == len(CONTENT) - 4 * BLOCK
    assert len(kept(tmp_path)) == 4
    assert opened(path, tmp_path, limit=0).read(0, 10) == CONTENT[:10]


def test_what_nobody_has_used_for_a_day_makes_room(path: str, tmp_path: Path) -> None:
    limit = 10 * (BLOCK + 32) / 1e9
    opened(path, tmp_path, limit=limit).read_all()
    (old,) = (folder for folder in tmp_path.iterdir())
    other = CONTENT[::-1]
    write(f"{path}2", other)
    assert opened(f"{path}2", tmp_path, content=other, limit=limit).read_all() == other
    assert [folder for folder in tmp_path.iterdir()] == [old], "it was in use a moment ago"
    then = time.time() - 25 * 3600
    os.utime(old, (then, then))
    assert opened(f"{path}2", tmp_path, content=other, limit=limit).read_all() == other
    assert not old.exists() and len(kept(tmp_path)) == 10


def test_a_nearly_full_disk_keeps_no_blocks(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"total": 1000, "free": 90})
    monkeypatch.setattr(store_cache.shutil, "disk_usage", lambda _: usage)
    assert opened(path, tmp_path).read(1, 3) == CONTENT[1:3]
    assert kept(tmp_path) == []


def test_a_folder_that_cannot_be_written_keeps_none_and_says_so(
    path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "cache"
    for _ in range(2):
        assert opened(path, folder).read_all() == CONTENT
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"blocks of stores in buckets cannot be kept in {folder} (Not a directory)")


def test_a_folder_that_another_process_removes_is_not_told(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone(*_: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(store_cache, "write_whole", gone)
    assert opened(path, tmp_path).read_all() == CONTENT
    assert capsys.readouterr().err == ""


def test_many_read_at_once(path: str, tmp_path: Path) -> None:
    readers = [opened(path, tmp_path) for _ in range(4)]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda number: readers[number % 4].read_all(), range(32)))
    assert set(found) == {CONTENT}
    assert len(kept(tmp_path)) == 10


def test_nonsense_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.cache\.most_gigabytes"):
        CacheConfig(most_gigabytes=-1)
