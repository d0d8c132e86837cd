"""Every kind of damage to a directory is named, and only that."""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path

import pytest
from etils import epath

from sealion_jax.checkpoint import digests
from sealion_jax.checkpoint.digests import check_digests, read_checked, write_digests, write_manifest
from sealion_jax.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "params" / "d").mkdir(parents=True)
    (tmp_path / "params" / "d" / "a1").write_bytes(bytes(range(256)) * 40_000)  # more than one read
    (tmp_path / "params" / "_METADATA").write_text("{}")
    (tmp_path / "train.json").write_text('{"step": 3}')
    (tmp_path / "empty").touch()
    write_digests(tmp_path)
    return tmp_path


def test_untouched_is_good_and_hashes_are_sha256(folder: Path) -> None:
    assert check_digests(folder) == []
    entry = json.loads((folder / "digests.json").read_text())["files"]["train.json"]
    assert entry == {"bytes": 11, "sha256": hashlib.sha256(b'{"step": 3}').hexdigest()}


def test_each_file_that_was_hashed_is_progress(folder: Path) -> None:
    """Of which the watch hears: a large checkpoint on slow storage takes long, and does not hang."""
    files: list[None] = []
    check_digests(folder, on_file=lambda: files.append(None))
    assert len(files) == 4
    check_digests(folder, share=(1, 2), on_file=lambda: files.append(None))
    assert len(files) == 6


def test_a_flipped_bit_is_named(folder: Path) -> None:
    path = folder / "params" / "d" / "a1"
    content = bytearray(path.read_bytes())
    content[5_000_000] ^= 0b100
    path.write_bytes(content)
    assert check_digests(folder) == ["params/d/a1: content changed (sha256 differs)"]


def test_a_truncated_file_is_named_with_its_sizes(folder: Path) -> None:
    (folder / "train.json").write_text('{"step"')
    assert check_digests(folder) == ["train.json: 7 bytes instead of 11"]


def test_missing_files_are_named(folder: Path) -> None:
    (folder / "params" / "d" / "a1").unlink()
    (folder / "empty").unlink()
    assert check_digests(folder) == ["empty: missing", "params/d/a1: missing"]


def test_a_directory_in_place_of_a_file_is_a_problem(folder: Path) -> None:
    (folder / "empty").unlink()
    (folder / "empty").mkdir()
    assert [line.partition(":")[0] for line in check_digests(folder)] == ["empty"]


def test_damage_to_the_manifest_itself_is_not_blamed_on_files(folder: Path) -> None:
    path = folder / "digests.json"
    text = path.read_text()
    digest = hashlib.sha256(b'{"step": 3}').hexdigest()
    path.write_text(text.replace(digest, digest[:-1] + ("0" if digest[-1] != "0" else "1")))
    assert check_digests(folder) == ["digests.json: content changed"]
    path.write_text(text[:-20])
    assert check_digests(folder) == ["digests.json: unreadable (JSONDecodeError)"]
    path.write_bytes(b"\xc3\x28 not text")
    assert check_digests(folder)[0].startswith("digests.json: unreadable")
    path.unlink()
    assert check_digests(folder) == ["digests.json: missing"]


def test_files_that_came_later_are_ignored(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    assert check_digests(folder) == []


def test_shares_together_see_what_one_sees(folder: Path) -> None:
    for name in ("params/d/a1", "params/_METADATA", "train.json"):
        content = bytearray((folder / name).read_bytes())
        content[0] ^= 1
        (folder / name).write_bytes(content)
    whole = check_digests(folder)
    shares = [check_digests(folder, share=(i, 3)) for i in range(3)]
    assert len(whole) == 3
    assert sorted(line for lines in shares for line in lines) == sorted(whole)
    assert all(len(lines) < 3 for lines in shares)


@pytest.mark.parametrize("error", [ConnectionError("reset"), TimeoutError(), PermissionError(13, "no")])
def test_storage_that_does_not_answer_says_nothing_of_the_files(
    folder: Path, error: OSError, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(digests, "_measure", refuse)
        with pytest.raises(type(error)):
            check_digests(folder)
    with monkeypatch.context() as patched:
        patched.setattr(type(epath.Path(folder)), "read_bytes", refuse)
        with pytest.raises(type(error)):
            check_digests(folder)
    assert check_digests(folder) == []


def test_a_disk_that_cannot_read_a_file_is_damage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bad_block(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(digests, "_measure", bad_block)
    assert all("unreadable" in problem for problem in check_digests(folder))


def test_a_file_is_read_only_as_it_was_written(folder: Path) -> None:
    name = "train.json"
    assert read_checked(folder, name) == (folder / name).read_bytes()
    content = bytearray((folder / name).read_bytes())
    content[0] ^= 1
    (folder / name).write_bytes(content)
    assert read_checked(folder, name) is None
    (folder / name).unlink()
    assert read_checked(folder, name) is None
    assert read_checked(folder, "never there") is None


def test_digests_of_another_writer_are_replaced_only_by_whoever_may(folder: Path) -> None:
    before = (folder / "digests.json").read_bytes()

    answers = iter(["still ours", "taken over"])

    def may_write() -> None:
        if next(answers) == "taken over":
            raise UserError("taken over")

    with pytest.raises(UserError, match="taken over"):
        write_manifest(folder, {}, may_write=may_write)
    assert (folder / "digests.json").read_bytes() == before
    write_manifest(folder, {})
    assert (folder / "digests.json").read_bytes() != before
