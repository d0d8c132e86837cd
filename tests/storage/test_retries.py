"""What is done a second time because an answer got lost has the effect of doing it once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tensorstore as ts

from sealion_jax.checkpoint.files import remove_tree
from sealion_jax.checkpoint.lease import RunLease
from sealion_jax.errors import UserError
from sealion_jax.mirror import Mirror
from sealion_jax.storage import file_system, remove, write_whole
from tests.storage.gcs import Faults, FaultyDoor, GcsServer


@pytest.fixture
def door(
    here: GcsServer, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[FaultyDoor]:
    """gs:// of this process, whose first writes have these fates."""
    with here.faulty(Faults(first_writes=request.param)) as faulty:
        for name, value in faulty.environment().items():
            monkeypatch.setenv(name, value)
        yield faulty


LOST = pytest.mark.parametrize("door", [("lose_answer",)], indirect=True, ids=["lost"])
EACH = pytest.mark.parametrize(
    "door", [("refuse",), ("reset",), ("lose_answer",)], indirect=True, ids=["refused", "reset", "lost"]
)


def fates(door: FaultyDoor) -> list[str | None]:
    return [request.fault for request in door.requests() if request.method != "GET"]


@EACH
def test_a_lease_is_taken_once(door: FaultyDoor, server: GcsServer, tmp_path: Path) -> None:
    """Also when the first request made the file: the second then finds it there, and it is our own."""
    url = server.url(f"leases/{tmp_path.name}")
    with RunLease(url) as lease:
        assert lease.token == 1
        assert len(server.files().find(f"{url}/lease")) == 1
        with pytest.raises(UserError, match="is in use by pid"):
            RunLease(url).__enter__()
    assert fates(door)[0] is not None
    with RunLease(url) as lease:
        assert lease.token == 2


@LOST
def test_removing_what_is_removed_already(door: FaultyDoor, server: GcsServer, tmp_path: Path) -> None:
    path = server.url(f"removed/{tmp_path.name}/file")
    server.files().pipe_file(path, b"content")
    remove(path)
    assert fates(door) == ["lose_answer", None]
    assert not server.files().exists(path)
    remove(path)


@LOST
def test_removing_a_tree(door: FaultyDoor, server: GcsServer, tmp_path: Path) -> None:
    folder = server.url(f"trees/{tmp_path.name}")
    server.files().pipe_file(f"{folder}/step/file", b"content")
    remove_tree(f"{folder}/step")
    assert fates(door)[0] == "lose_answer"
    assert server.files().find(folder) == []


@EACH
def test_writing_a_file(door: FaultyDoor, server: GcsServer, tmp_path: Path) -> None:
    path = server.url(f"written/{tmp_path.name}")
    write_whole(path, b"content")
    assert len(fates(door)) == 2 and fates(door)[0] is not None
    system, inner = file_system(path)
    assert system.cat_file(inner) == b"content"


@EACH
def test_tensorstore(door: FaultyDoor, server: GcsServer, tmp_path: Path) -> None:
    """It writes its index on the condition that nobody else has, and its own must not be taken for that."""
    store = ts.KvStore.open({"driver": "ocdbt", "base": server.url(f"arrays/{tmp_path.name}/")}).result()
    for number in range(3):
        store.write(f"key{number}", bytes([number]) * 3000).result()
    assert [store.read(f"key{number}").result().value for number in range(3)] == [
        bytes([number]) * 3000 for number in range(3)
    ]
    assert fates(door)[0] is not None


@LOST
def test_a_mirror(door: FaultyDoor, server: GcsServer, tmp_path: Path) -> None:
    url = server.url(f"mirrored/{tmp_path.name}")
    with Mirror(url) as mirror:
        (mirror.folder / "log").write_text("1\n")
        mirror.sync()
        assert server.files().cat_file(f"{url}/log") == b"1\n"
    assert fates(door) == ["lose_answer", None]
