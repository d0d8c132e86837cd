"""Starting the Google Cloud Storage server of `gcs_server.py`, and having it misbehave.

with gcs_server() as server:
    subprocess.run([..., "--run-dir", server.url("run")], env={**os.environ, **server.environment()})
    with server.faulty(Faults(refuse=0.1, delay=0.1, seed=1)) as door:
        subprocess.run([..., "--run-dir", server.url("run")], env={**os.environ, **door.environment()})
        print(door.requests())
    server.files().find(server.url("run"))     # through the clean door
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.storage.gcs_server import CONTROL

# Before gcsfs is imported, which chooses its client by it: the other one asks Google about the bucket.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

ROOT = Path(__file__).resolve().parents[2]
BUCKET = "sealion"


@dataclass(frozen=True, kw_only=True)
class Faults:
    """Shares of the requests that something befalls, drawn from a seed; one thing at most befalls each."""

    refuse: float = 0.0
    """Answered with 503, 429 or 500."""
    reset: float = 0.0
    """Their connection is broken before anything is done."""
    lose_answer: float = 0.0
    """Done, and the connection is broken instead of an answer."""
    delay: float = 0.0
    delay_seconds: float = 0.5
    first_writes: tuple[str, ...] = ()
    """What befalls the first requests that write, one after another, by the names of fields above or ""."""
    read_only: bool = False
    """Everything that writes is answered with 403."""
    no_account: bool = False
    """Everything is answered with 401, as to one who does not say who they are."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a door was asked."""

    method: str
    path: str
    status: int
    """0 where the connection was broken."""
    fault: str | None
    written: str | None
    """The name of the object that it wrote."""

    @property
    def is_read_of_content(self) -> bool:
        """Whether it is for the bytes of an object."""
        return self.method == "GET" and "alt=media" in self.path


@dataclass(frozen=True)
class Door:
    """An address under which the server is to be had."""

    port: int

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self) -> dict[str, str]:
        """What has a process find the server, and look for no account: gcsfs, tensorstore, google-auth."""
        return {
            "STORAGE_EMULATOR_HOST": self.address,
            "TENSORSTORE_GCS_HTTP_URL": self.address,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "NO_GCE_CHECK": "true",
            # Tensorstore would ask the machine's metadata server for an account.
            "GCE_METADATA_ROOT": "127.0.0.1:1",
        }

    def requests(self) -> list[Request]:
        """What it was asked so far, in order; only of a door with faults, which may be none."""
        return [
            Request(method=method, path=path, status=status, fault=fault, written=written)
            for method, path, status, fault, written in self._control("requests", self.port)
        ]

    def _control(self, action: str, value: Any) -> Any:
        request = urllib.request.Request(f"{self._clean}{CONTROL}{action}", json.dumps(value).encode())
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    @property
    def _clean(self) -> str:
        return self.address


def files_at(address: str) -> Any:
    """A file system of fsspec over the server at this address, which keeps no listings."""
    from gcsfs.core import GCSFileSystem

    return GCSFileSystem(
        endpoint_url=address, token="anon", use_listings_cache=False, skip_instance_cache=True
    )


@dataclass(frozen=True)
class FaultyDoor(Door):
    """One that misbehaves; the server is told about it through its clean door."""

    clean: str

    @property
    def _clean(self) -> str:
        return self.clean


@dataclass(frozen=True)
class GcsServer(Door):
    """The server, by its clean door."""

    def url(self, path: str = "") -> str:
        """ "gs://sealion/<path>"."""
        return f"gs://{BUCKET}/{path}"

    def files(self) -> Any:
        """A file system of fsspec that reads and writes the bucket as it is now, whatever the environment."""
        return files_at(self.address)

    @contextlib.contextmanager
    def faulty(self, faults: Faults) -> Iterator[FaultyDoor]:
        """A door of its own with these faults; other doors to the same objects stay as they are."""
        port = self._control("open", dataclasses.asdict(faults))
        try:
            yield FaultyDoor(port, self.address)
        finally:
            self._control("close", port)


@contextlib.contextmanager
def gcs_server() -> Iterator[GcsServer]:
    """A server with an empty bucket, in a process of its own; it ends with the block or this process."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.storage.gcs_server", BUCKET],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            yield GcsServer(json.loads(process.stdout.readline())["port"])
        finally:
            process.stdin.close()
            process.wait(timeout=30)
