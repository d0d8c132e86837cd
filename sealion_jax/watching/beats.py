"""Heartbeats and notes of a run's processes, in `<run>/heartbeats/`, on a disk or on gs://."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from sealion_jax.config_tree import from_plain
from sealion_jax.errors import UserError
from sealion_jax.storage import add_line, create, file_system, read_lines, remove, write_whole

HEARTBEATS = "heartbeats"
HANGS_FILE = "hangs.jsonl"


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
    """The directory `<run>/heartbeats/`; every call may fail, or take long, as storage does."""

    def __init__(self, run_dir: str) -> None:
        self._run_dir = run_dir.rstrip("/")
        self._fs, self._folder = file_system(f"{self._run_dir}/{HEARTBEATS}")

    def write(self, beat: Beat) -> None:
        """Puts the heartbeat in the place of the one before, in one piece."""
        self.keep(f"{beat.process}.json", encode(dataclasses.asdict(beat)))

    def read(self, process: int) -> Beat | None:
        """The heartbeat that is there; None if there is none that can be read."""
        plain = self.note(f"{process}.json")
        try:
            return None if plain is None else from_plain(plain, Beat)
        except UserError:  # of another version
            return None

    def read_all(self) -> list[Beat]:
        """Every process's heartbeat, in order."""
        beats = [self.read(int(name)) for name in self._names(".json") if name.isdecimal()]
        return sorted((beat for beat in beats if beat is not None), key=lambda beat: beat.process)

    def note(self, name: str) -> dict[str, Any] | None:
        """A JSON object of this directory; None if it is not there, or not whole yet."""
        try:
            plain = json.loads(self._fs.cat_file(f"{self._folder}/{name}"))
        except (FileNotFoundError, ValueError):
            return None
        return plain if isinstance(plain, dict) else None

    def note_once(self, name: str, plain: dict[str, Any]) -> bool:
        """Writes a JSON object, unless one is there; whether it was written.

        That is not told for sure in a bucket: when an answer gets lost, and the request is repeated, the
        object is there already.
        """
        try:
            create(f"{self._run_dir}/{HEARTBEATS}/{name}", encode(plain))
        except FileExistsError:
            return False
        return True

    def keep(self, name: str, content: bytes) -> str:
        """The path of a file of the directory, written anew with this."""
        path = f"{self._run_dir}/{HEARTBEATS}/{name}"
        # Not synced to the disk: what counts is what the other processes see now.
        write_whole(path, content, synced=False)
        return path

    def remove_others(self, attempt: str, processes: int) -> None:
        """Removes the notes of earlier attempts, and the heartbeats of processes that the run has no more."""
        for name in self._names(".json"):
            is_beat = name.isdecimal()
            if (is_beat and int(name) >= processes) or (not is_beat and attempt not in name):
                remove(f"{self._run_dir}/{HEARTBEATS}/{name}.json")

    def add_hang(self, plain: dict[str, Any]) -> None:
        """Adds a line to the run's hangs.jsonl."""
        add_line(f"{self._run_dir}/{HANGS_FILE}", plain, synced=False)

    def hangs(self) -> list[dict[str, Any]]:
        """The lines of the run's hangs.jsonl, oldest first."""
        return read_lines(f"{self._run_dir}/{HANGS_FILE}")

    def _names(self, ending: str) -> list[str]:
        """Names of the directory's files that end so, without their ending."""
        try:
            paths = self._fs.ls(self._folder, detail=False, refresh=True)
        except FileNotFoundError:
            return []
        names = [path.rsplit("/", 1)[-1] for path in paths]
        return [name.removesuffix(ending) for name in names if name.endswith(ending)]


def encode(plain: dict[str, Any]) -> bytes:
    """A JSON object as people read it."""
    return json.dumps(plain, indent=1, ensure_ascii=False).encode()
