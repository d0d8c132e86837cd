"""The server that the other tests rely on does what Google's does, and misbehaves as it is told."""

from __future__ import annotations

import dataclasses
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.storage.gcs import Faults, GcsServer, files_at


def test_only_one_creates_an_object(server: GcsServer) -> None:
    def create(number: int) -> bool:
        try:
            files_at(server.address).pipe_file(server.url("created"), b"%d" % number, mode="create")
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        created = list(pool.map(create, range(8)))
    assert created.count(True) == 1
    assert server.files().cat_file(server.url("created")) == b"%d" % created.index(True)


@pytest.mark.parametrize("fault", ["refuse", "reset", "lose_answer", "delay"])
def test_faults(server: GcsServer, fault: str) -> None:
    """They befall the share of requests that they should, and the door tells which."""
    faults = dataclasses.replace(Faults(delay_seconds=0.05, seed=3), **{fault: 0.4})
    with server.faulty(faults) as door:
        outcomes = [put(door.address, f"{fault}-{number}") for number in range(40)]
        asked = door.requests()
    hit = [request.fault == fault for request in asked]
    assert 8 <= hit.count(True) <= 24
    good = [
        {"refuse": False, "reset": False, "lose_answer": False, "delay": True}[fault] or not h for h in hit
    ]
    assert outcomes == good
    there = set(server.files().ls(server.url(), detail=False))
    done = [f"sealion/{fault}-{number}" in there for number in range(40)]
    assert done == (good if fault in ("refuse", "reset") else [True] * 40)


def put(address: str, name: str) -> bool:
    """Whether one request to make an object is answered as it should be."""
    url = f"{address}/upload/storage/v1/b/sealion/o?uploadType=media&name={name}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, b"content"), timeout=30) as answer:
            return answer.status == 200
    except OSError:
        return False


def test_read_only(server: GcsServer) -> None:
    server.files().pipe_file(server.url("read_only"), b"before")
    with server.faulty(Faults(read_only=True)) as door:
        files = files_at(door.address)
        with pytest.raises(OSError, match="Forbidden"):
            files.pipe_file(server.url("read_only"), b"after")
        assert files.cat_file(server.url("read_only")) == b"before"
