"""Heartbeats and notes of a run's processes, in `<run>/heartbeats/`, on a disk or on gs://."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from sealion_jax.config_tree import from_plain
from sealion_jax.errors import UserError
from sealion_jax.storage import add_line, create, file_system, read_lines, write_whole

HEARTBEATS = "heartbeats"
HANGS_FILE = "hangs.jsonl"

SILENCE_SECONDS = 4.0
"""A request without an answer is tried again so soon: a minute of waiting would pass for a dead process."""
_THREADS = 64
"""So many heartbeats are read at once: 1,024 in a second where each takes 50 ms."""


@dataclass(frozen=True, kw_only=True)
class Beat:
    """One process, as it described itself."""

    attempt: str
    """Shared by the processes that were started together."""
    process: int
    processes: int
    """How many the run has."""
    host: str
    pid: int
    machine: str
    """Boot and process namespace in which `pid` means something; "" where the system does not tell."""
    process_start: str
    """When the process started, in the system's own count: tells a pid from its reuse."""
    started_at: float
    """Seconds since 1970, as all times here, by the clock of that host."""
    doing: str
    step: int | None
    """Steps done; None before training."""
    progress_at: float
    """When what it is doing began, or last moved on."""
    moves: int
    """Grows whenever it begins something, or moves on."""
    beat: int
    """Grows with every heartbeat: whether a process lives is told by this, not by comparing clocks."""
    beat_at: float
    beat_seconds: float
    lease: int | None = None
    """The number of the lease by which this attempt has the run directory; later ones have higher numbers."""
    alarm: int = 0
    """The number of the alarm that the process has heard of, and has dumped its stacks for."""
    stacks: str = ""
    """Where its stacks are, once it answered an alarm."""
    stacks_descriptor: int = -1
    """Of the file that it writes them to."""
    ended: str | None = None
    """How it ended, of a process that did: "done", "stopped" or an error; None while it runs."""

    def describe(self) -> str:
        """ "process 2 (pid 71 on node3)"."""
        return f"process {self.process} (pid {self.pid} on {self.host})"


class BeatFiles:
    """What an attempt of a run keeps in `<run>/heartbeats/`; calls may fail, or take long, as storage does.

    The names of all files that say something to other processes have the attempt in them. So whatever other
    attempts there are, one that died or one that somebody started by mistake, none hears the other's word.
    """

    def __init__(self, run_dir: str, attempt: str) -> None:
        self._run_dir = run_dir.rstrip("/")
        self._attempt = attempt
        self._fs, self._folder = _open(self._run_dir)

    def write(self, beat: Beat) -> None:
        """Puts the heartbeat in the place of the one before, in one piece."""
        self.keep(_beat_name(beat.process, self._attempt), encode(dataclasses.asdict(beat)))

    def read(self, process: int) -> Beat | None:
        """The heartbeat that is there; None if there is none that can be read."""
        return _beat(_plain(self._fs, f"{self._folder}/{_beat_name(process, self._attempt)}"))

    def read_many(self, processes: Sequence[int]) -> dict[int, Beat | None]:
        """The heartbeat of each of these, read at once: one after another they would take minutes."""
        with ThreadPoolExecutor(_THREADS) as pool:
            return dict(zip(processes, pool.map(self.read, processes), strict=True))

    def note(self, name: str) -> dict[str, Any] | None:
        """What the attempt has noted under this name; None if nothing, or if that is not whole yet."""
        return _plain(self._fs, f"{self._folder}/{self._note_name(name)}")

    def note_once(self, name: str, plain: dict[str, Any]) -> bool:
        """Notes a JSON object, unless there is one of that name; whether it was written.

        That is not told for sure in a bucket: when an answer gets lost, and the request is repeated, the
        object is there already.
        """
        path = f"{self._run_dir}/{HEARTBEATS}/{self._note_name(name)}"
        try:
            create(path, encode(plain), synced=False, silence_seconds=SILENCE_SECONDS)
        except FileExistsError:
            return False
        return True

    def keep(self, name: str, content: bytes) -> str:
        """The path of a file of the directory, written anew with this."""
        path = f"{self._run_dir}/{HEARTBEATS}/{name}"
        # Not synced to the disk: what counts is what the other processes see now.
        write_whole(path, content, synced=False, silence_seconds=SILENCE_SECONDS)
        return path

    def is_replaced(self, lease: int) -> bool:
        """Whether another attempt has had the run directory since this one's lease, as its process 0 says."""
        names = [name for name in _names(self._fs, self._folder) if name.startswith("0-")]
        beats = [_beat(_plain(self._fs, f"{self._folder}/{name}")) for name in names]
        return any(beat is not None and beat.lease is not None and beat.lease > lease for beat in beats)

    def remove_others(self) -> None:
        """Removes the heartbeats and notes of other attempts, and what is left of writers that were killed.

        Only for the attempt that holds the run directory. Stacks stay: somebody may want to read them.
        """
        names = [name for name in _names(self._fs, self._folder) if self._attempt not in name]
        others = [name for name in names if name.endswith(".json") or name.startswith(".")]
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(self._remove, others))

    def add_hang(self, plain: dict[str, Any]) -> None:
        """Adds a line to the run's hangs.jsonl."""
        add_line(f"{self._run_dir}/{HANGS_FILE}", plain, synced=False)

    def _note_name(self, name: str) -> str:
        return f"{name}-{self._attempt}.json"

    def _remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._folder}/{name}")


def read_all(run_dir: str) -> list[Beat]:
    """Every process's heartbeat, of all attempts, in no order."""
    fs, folder = _open(run_dir.rstrip("/"))
    names = [name for name in _names(fs, folder) if name.partition("-")[0].isdecimal()]
    with ThreadPoolExecutor(_THREADS) as pool:
        beats = pool.map(lambda name: _beat(_plain(fs, f"{folder}/{name}")), names)
        return [beat for beat in beats if beat is not None]


def read_hangs(run_dir: str) -> list[dict[str, Any]]:
    """The lines of the run's hangs.jsonl, oldest first."""
    return read_lines(f"{run_dir.rstrip('/')}/{HANGS_FILE}")


def _open(run_dir: str) -> tuple[Any, str]:
    return file_system(f"{run_dir}/{HEARTBEATS}", silence_seconds=SILENCE_SECONDS)


def _beat_name(process: int, attempt: str) -> str:
    return f"{process}-{attempt}.json"


def _names(fs: Any, folder: str) -> list[str]:
    try:
        return [path.rsplit("/", 1)[-1] for path in fs.ls(folder, detail=False, refresh=True)]
    except FileNotFoundError:
        return []


def _plain(fs: Any, path: str) -> dict[str, Any] | None:
    """The JSON object in a file; None if it is not there, or not whole yet."""
    try:
        plain = json.loads(fs.cat_file(path))
    except (FileNotFoundError, ValueError):
        return None
    return plain if isinstance(plain, dict) else None


def _beat(plain: dict[str, Any] | None) -> Beat | None:
    try:
        return None if plain is None else from_plain(plain, Beat)
    except UserError:  # of another version
        return None


def encode(plain: dict[str, Any]) -> bytes:
    """A JSON object as people read it."""
    return json.dumps(plain, indent=1, ensure_ascii=False).encode()
