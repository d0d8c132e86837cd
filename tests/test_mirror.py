"""Files that grow here are the same in the bucket when they have to be."""

from __future__ import annotations

import time
import uuid
from pathlib import Path

import fsspec
import pytest

from sealion_jax.mirror import Mirror


@pytest.fixture
def bucket() -> str:
    """fsspec's in-memory file system stands for gs://."""
    return f"memory://{uuid.uuid4().hex}/run"


def there(bucket: str) -> dict[str, bytes]:
    system, root = fsspec.core.url_to_fs(bucket)
    return {path.removeprefix(f"{root}/"): system.cat_file(path) for path in system.find(root)}


def put(bucket: str, **contents: bytes) -> None:
    system, root = fsspec.core.url_to_fs(bucket)
    for name, content in contents.items():
        system.pipe_file(f"{root}/{name.replace('__', '/')}", content)


def test_what_grows_is_copied_when_asked_and_at_the_end(bucket: str) -> None:
    with Mirror(bucket) as mirror:
        with (mirror.folder / "log").open("w") as log:
            log.write("1\n")
            log.flush()
            assert there(bucket) == {}
            mirror.sync()
            assert there(bucket) == {"log": b"1\n"}
            log.write("2\n")
        (mirror.folder / "below").mkdir()
        (mirror.folder / "below" / "picture").write_bytes(b"p")
        (mirror.folder / "half.new").write_bytes(b"not whole yet")
        (mirror.folder / "below" / ".half-12-34").write_bytes(b"nor this")
    assert there(bucket) == {"log": b"1\n2\n", "below/picture": b"p"}
    assert not mirror.folder.exists(), "nothing is left on the machine"


def test_a_later_run_goes_on_with_what_is_carried_and_renews_the_rest(bucket: str) -> None:
    put(bucket, log=b"1\n", tensorboard__old=b"o", plots__loss=b"l")
    with Mirror(bucket, carried=("log", "missing"), renewed=("tensorboard",)) as mirror:
        assert {path.name for path in mirror.folder.iterdir()} == {"log"}
        with (mirror.folder / "log").open("a") as log:
            log.write("2\n")
        (mirror.folder / "tensorboard").mkdir()
        (mirror.folder / "tensorboard" / "new").write_bytes(b"n")
        mirror.sync()
        assert there(bucket) == {"log": b"1\n2\n", "tensorboard/new": b"n", "plots/loss": b"l"}


def test_what_is_removed_here_is_removed_there(bucket: str) -> None:
    with Mirror(bucket) as mirror:
        (mirror.folder / "one").write_bytes(b"1")
        (mirror.folder / "two").write_bytes(b"2")
        mirror.sync()
        (mirror.folder / "one").unlink()
    assert there(bucket) == {"two": b"2"}


def test_only_what_has_changed_is_copied(bucket: str) -> None:
    with Mirror(bucket) as mirror:
        (mirror.folder / "one").write_bytes(b"1")
        mirror.sync()
        put(bucket, one=b"another process's")
        mirror.sync()
        assert there(bucket) == {"one": b"another process's"}


def test_it_is_copied_from_time_to_time(bucket: str) -> None:
    with Mirror(bucket, interval_seconds=0.05) as mirror:
        (mirror.folder / "log").write_bytes(b"1")
        deadline = time.monotonic() + 20
        while there(bucket) != {"log": b"1"}:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_nothing_is_copied_to_another_process_s_folder(bucket: str) -> None:
    def refuse() -> None:
        raise RuntimeError("taken over")

    with pytest.raises(RuntimeError, match="taken over"), Mirror(bucket, may_write=refuse) as mirror:
        (mirror.folder / "log").write_bytes(b"1")
    assert there(bucket) == {}


def test_an_error_is_not_hidden_behind_that_of_a_copy(bucket: str) -> None:
    def refuse() -> None:
        raise RuntimeError("cannot be copied")

    with pytest.raises(ValueError, match="what happened"), Mirror(bucket, may_write=refuse) as mirror:
        (mirror.folder / "log").write_bytes(b"1")
        raise ValueError("what happened")


def test_a_folder_on_a_disk_is_itself(tmp_path: Path) -> None:
    with Mirror(str(tmp_path), carried=("log",), renewed=("tensorboard",)) as mirror:
        assert mirror.folder == tmp_path
        (tmp_path / "tensorboard").mkdir()
        mirror.sync()
    assert (tmp_path / "tensorboard").exists()
