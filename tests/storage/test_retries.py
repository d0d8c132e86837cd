"""What is done a second time because an answer got lost has the effect of doing it once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tensorstore as ts
from etils import epath

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


SILENT = """
import os, sys
from sealion_jax.storage import prepare_clients, write_whole
prepare_clients()
from fsspec.config import conf
from aiohttp import ClientTimeout
for protocol in ("gs", "gcs"):
    conf[protocol]["requests_timeout"] = ClientTimeout(total=None, sock_read=1)
write_whole(sys.argv[1], b"content")
import tensorstore as ts
ts.KvStore.open({"driver": "gcs", "bucket": "sealion", "path": sys.argv[2]}).result().write("", b"1").result()
"""


@pytest.mark.slow
def test_a_server_that_takes_a_request_and_never_answers(server: GcsServer) -> None:
    """Both clients ask again; with a second as their limit instead of a minute."""
    seconds = {"TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "1"}
    with server.faulty(Faults(first_writes=("delay", "", "delay"), delay_seconds=60)) as door:
        done = subprocess.run(
            [sys.executable, "-c", SILENT, server.url("silent"), "silent_arrays"],
            env={**os.environ, **door.environment(), **seconds},
            timeout=150,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert server.files().cat_file(server.url("silent")) == b"content"
    assert server.files().cat_file(server.url("silent_arrays")) == b"1"


@LOST
def test_a_mirror(door: FaultyDoor, server: GcsServer, tmp_path: Path) -> None:
    url = server.url(f"mirrored/{tmp_path.name}")
    with Mirror(url) as mirror:
        (mirror.folder / "log").write_text("1\n")
        mirror.sync()
        assert server.files().cat_file(f"{url}/log") == b"1\n"
    assert fates(door) == ["lose_answer", None]


@EACH
def test_a_file_that_is_written_in_pieces(door: FaultyDoor, server: GcsServer, tmp_path: Path) -> None:
    """As epath does: first the upload is begun, and then the bytes follow; each fate in turn."""
    path = server.url(f"pieces/{tmp_path.name}")
    with epath.Path(path).open("wb") as file:
        file.write(b"some, ")
        file.write(b"and more")
    assert fates(door)[0] is not None
    assert server.files().cat_file(path) == b"some, and more"


@pytest.mark.parametrize(
    "door", [("", "lose_answer"), ("", "refuse"), ("lose_answer", "lose_answer")], indirect=True, ids=str
)
def test_the_pieces_themselves(door: FaultyDoor, server: GcsServer, tmp_path: Path) -> None:
    path = server.url(f"themselves/{tmp_path.name}")
    epath.Path(path).write_bytes(b"content")
    assert any(fates(door)[1:])
    assert server.files().cat_file(path) == b"content"
