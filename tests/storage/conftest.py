"""A Google Cloud Storage server for the tests of storage, and this process told where it is."""

from __future__ import annotations

from collections.abc import Iterator

import fsspec
import pytest

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
