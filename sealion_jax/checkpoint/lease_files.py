"""The files of a run directory's lease, and whether the process that wrote one still lives."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import time
from dataclasses import dataclass

from sealion_jax.machine import lives_here, process_start, this_machine
from sealion_jax.storage import create, file_system, write_whole


@dataclass(frozen=True, kw_only=True)
class JobStart:
    """One of the times that a scheduler has started a job of its."""

    job: str
    """The job's name, the same each time that it is started: "slurm 42"."""
    restarts: int
    """How often it had been started before."""


@dataclass(frozen=True, kw_only=True)
class LeaseRecord:
    """Who holds a run directory, as its lease file says."""

    token: int
    owner: str
    host: str
    pid: int
    machine: str
    """Boot and process namespace in which `pid` means something; "" where the system does not tell."""
    process_start: str
    """When the process started, in the system's own count: tells a pid from its reuse."""
    acquired_at: float
    heartbeat_at: float
    released: bool = False
    job: str = ""
    """The scheduler's job that the holder is a part of; "" for none."""
    restarts: int = 0


class LeaseFiles:
    """The lease's directory: `<token>.json`, of which the highest counts."""

    def __init__(self, url: str) -> None:
        self._folder = url
        self._fs, self._path = file_system(url)

    def newest(self) -> LeaseRecord | None:
        """The record of the highest token; None if there is none."""
        tokens: list[int] = []
        for _ in range(20):
            tokens = self._tokens()
            if not tokens:
                return None
            try:
                return LeaseRecord(**json.loads(self._fs.cat_file(self._file(tokens[-1]))))
            except (FileNotFoundError, ValueError, TypeError):
                time.sleep(0.05)  # replaced, or being created, at this moment
        # Created and never filled: its writer died in between. Its time stands for the heartbeat.
        return self._placeholder(tokens[-1])

    def create(self, token: int, *, owner: str, start: JobStart | None = None) -> LeaseRecord | None:
        """This process's record under `token`, or None if another was faster."""
        now = time.time()
        record = LeaseRecord(
            token=token,
            owner=owner,
            host=socket.gethostname(),
            pid=os.getpid(),
            machine=this_machine(),
            process_start=process_start(os.getpid()) or "",
            acquired_at=now,
            heartbeat_at=now,
            job=start.job if start else "",
            restarts=start.restarts if start else 0,
        )
        try:
            create(self._url(token), _encode(record))
        except FileExistsError:
            newest = self.newest()
            if newest is None or newest.owner != owner:  # else our own upload, tried again after a hiccup
                return None
        if self._tokens()[-1:] != [token]:
            # We went by an old listing: a later holder has come and removed the file that had our number.
            self._remove(token)
            return None
        for older in self._tokens()[:-1]:
            self._remove(older)
        return record

    def overwrite(self, record: LeaseRecord) -> None:
        """Writes the record's file anew, in one piece."""
        write_whole(self._url(record.token), _encode(record), synced=False)

    def _remove(self, token: int) -> None:
        with contextlib.suppress(FileNotFoundError):  # another process was faster, or a lost answer
            self._fs.rm_file(self._file(token))

    def _tokens(self) -> list[int]:
        try:
            names = [entry.rsplit("/", 1)[-1] for entry in self._fs.ls(self._path, detail=False)]
        except FileNotFoundError:
            return []
        stems = [name.removesuffix(".json") for name in names if name.endswith(".json")]
        return sorted(int(stem) for stem in stems if stem.isdecimal())

    def _file(self, token: int) -> str:
        return f"{self._path}/{token:08d}.json"

    def _url(self, token: int) -> str:
        return f"{self._folder}/{token:08d}.json"

    def _placeholder(self, token: int) -> LeaseRecord:
        modified = self._fs.modified(self._file(token)).timestamp()
        return LeaseRecord(
            token=token,
            owner="",
            host="an unknown machine",
            pid=0,
            machine="",
            process_start="",
            acquired_at=modified,
            heartbeat_at=modified,
        )


def _encode(record: LeaseRecord) -> bytes:
    return json.dumps(dataclasses.asdict(record), indent=1).encode()


def describe(record: LeaseRecord) -> str:
    """ "pid 12 on node3 since 2026-01-31 10:00:00 (last heartbeat 3 s ago)"."""
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.acquired_at))
    ago = max(0, time.time() - record.heartbeat_at)
    return f"pid {record.pid} on {record.host} since {since} (last heartbeat {ago:.0f} s ago)"


def alive_here(record: LeaseRecord) -> bool | None:
    """Whether the record's process lives; None if it belongs to another machine, container or boot."""
    return lives_here(machine=record.machine, pid=record.pid, start=record.process_start)
