"""A Google Cloud Storage server for the tests of storage, and this process told where it is."""

from __future__ import annotations

import os
from collections.abc import Iterator

import fsspec
import pytest

# Before gcsfs is imported, which chooses its client by it: the other one asks Google about the bucket.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

from tests.storage.gcs import Faults, FaultyDoor, GcsServer, gcs_server


@pytest.fixture(scope="session")
def server() -> Iterator[GcsServer]:
    with gcs_server() as running:
        yield running


@pytest.fixture
def here(server: GcsServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[GcsServer]:
    """The server, as gs:// of this process."""
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    # A client that was made before knows nothing of it.
    fsspec.filesystem("gs").clear_instance_cache()
    yield server
    fsspec.filesystem("gs").clear_instance_cache()


@pytest.fixture
def counted(server: GcsServer) -> Iterator[FaultyDoor]:
    """A door without faults, which tells what it was asked."""
    with server.faulty(Faults()) as door:
        yield door
