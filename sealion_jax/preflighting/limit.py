"""Measuring has a limit: a process that answers no more, fails or hangs is named with its node, and all end.

JAX's heartbeats go on while a device hangs, and where they stop JAX ends the others with SIGABRT and names
nobody. So every process tells the others each second that it lives, through JAX's own service. Whoever finds
something wrong tells the others what; all then say so and end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from sealion_jax.config_tree import from_plain
from sealion_jax.errors import UserError
from sealion_jax.key_value_store import key_value_store
from sealion_jax.watching.activity import Clock

_LOOK_SECONDS = 1.0
_FOLDER = "sealion_jax/preflight"
_VERDICT = "verdict"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Why all end, and which processes are to blame."""

    text: str
    processes: tuple[int, ...] = ()


class Store(Protocol):
    """What processes tell each other by; every call may fail, or never come back."""

    def tell(self, key: str, text: str, *, is_last_word: bool = False) -> None:
        """Keeps the text; in the place of the one before, or of none where that is the last word."""

    def told(self) -> Mapping[str, str]:
        """All that was told, by its key."""
        ...


class JaxStore:
    """JAX's own service, which lives in process 0."""

    def __init__(self) -> None:
        self._store = key_value_store()

    def tell(self, key: str, text: str, *, is_last_word: bool = False) -> None:
        with contextlib.suppress(Exception):  # the last word is spoken already, or nobody is there
            self._store.key_value_set(f"{_FOLDER}/{key}", text, allow_overwrite=not is_last_word)

    def told(self) -> Mapping[str, str]:
        pairs = self._store.key_value_dir_get(_FOLDER)
        return {key.rpartition("/")[2]: text for key, text in pairs}


class Limit:
    """Ends the process, and the others with it, once one of them answers no more, fails, or takes too long.

    As a context manager it looks after the block, in which `doing` says what is measured.
    """

    def __init__(
        self,
        hosts: Sequence[str],
        *,
        process: int,
        limit_seconds: float,
        silent_seconds: float,
        store: Store | None = None,
        blame: Callable[[Sequence[str]], None] = lambda _: None,
        report: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
        end: Callable[[int], None] = os._exit,
    ) -> None:
        """
        Args:
            hosts: of each process.
            store: None where this process is the only one.
            blame: is given the nodes to blame before all end, on the first process that is not to blame.
        """
        self._hosts = hosts
        self._process = process
        self._limit_seconds = limit_seconds
        self._silent_seconds = silent_seconds
        self._store = store
        self._blame = blame
        self._report = report
        self._end = end
        self._clock = Clock(time.monotonic, longest_gap_seconds=5 * _LOOK_SECONDS)
        self._doing: tuple[str, bool, float] | None = None
        self._closing = threading.Event()
        self._told: Mapping[str, str] = {}
        self._asked_at = self._clock.now()
        self._heard: dict[int, tuple[str, float]] = {}
        self._threads = [threading.Thread(target=self._look, name="limit", daemon=True)]
        if store is not None:
            self._threads.append(threading.Thread(target=self._talk, name="signs of life", daemon=True))

    def __enter__(self) -> Limit:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What is the user's mistake is raised by all alike.
        if self._store is not None and isinstance(error, Exception) and not isinstance(error, UserError):
            self._end_with_the_others(error)
        self._closing.set()

    def _end_with_the_others(self, error: Exception) -> None:
        """Tells an error, and ends the process; not by returning: JAX waits at the exit for the others."""
        traceback.print_exception(error)
        _, together, _ = self._doing or ("", False, 0.0)
        if together:
            # Perhaps because another is gone, who is the one to name: that shows when it is silent.
            self._threads[0].join(self._silent_seconds + 5 * _LOOK_SECONDS)
        said = " ".join(f"{type(error).__name__}: {error}".split())
        processes = () if together else (self._process,)
        self._leave(self._agreed(Verdict(text=f"{self._who()} failed: {said}", processes=processes)))

    @contextlib.contextmanager
    def doing(self, what: str, *, together: bool = False) -> Iterator[None]:
        """The block is what this process does now; `together` where it cannot do it without the others."""
        self._doing = (what, together, self._clock.now())
        yield
        self._doing = None

    def _talk(self) -> None:
        """Tells the others that this process lives, and hears of them; any call may hang."""
        assert self._store is not None
        beat = 0
        while not self._closing.wait(_LOOK_SECONDS):
            beat += 1
            with contextlib.suppress(Exception):
                self._store.tell(str(self._process), str(beat))
                self._told = self._store.told()
                self._asked_at = self._clock.now()

    def _look(self) -> None:
        """Ends the process when something is wrong; waits for nothing that may hang."""
        while not self._closing.wait(_LOOK_SECONDS):
            now = self._clock.tick()
            verdict = self._on_others(now) or self._on_itself(now)
            if verdict is not None:
                self._leave(verdict)
                return

    def _on_others(self, now: float) -> Verdict | None:
        """What somebody has told, or who is silent."""
        if self._store is None:
            return None
        told = self._told
        if _VERDICT in told:
            return from_plain(json.loads(told[_VERDICT]), Verdict)
        if now - self._asked_at > self._silent_seconds:
            return self._silent([0])  # whose service does not answer
        for process in range(len(self._hosts)):
            text = told.get(str(process), "")
            if process not in self._heard or self._heard[process][0] != text:
                self._heard[process] = (text, now)
        silent = [n for n, (_, since) in self._heard.items() if now - since > self._silent_seconds]
        return self._agreed(self._silent(silent)) if silent else None

    def _on_itself(self, now: float) -> Verdict | None:
        """Whether this process takes too long; who hangs alone says so before those that wait for it."""
        what, together, since = self._doing or ("", False, now)
        limit = self._limit_seconds * (2 if together else 1)
        if now - since <= limit:
            return None
        advice = "what hangs is not known" if together else "a device or a file hangs"
        text = f"{self._who()} needs more than {limit:.0f} s for {what}: {advice}, or raise --limit-seconds"
        return self._agreed(Verdict(text=text, processes=() if together else (self._process,)))

    def _silent(self, processes: Sequence[int]) -> Verdict:
        who = ", ".join(f"{process} on {self._hosts[process]}" for process in processes)
        return Verdict(
            text=f"no sign of life for {self._silent_seconds:.0f} s from process {who}: stopped, killed, or "
            "cut off",
            processes=tuple(processes),
        )

    def _who(self) -> str:
        return f"process {self._process} on {self._hosts[self._process]}"

    def _agreed(self, own: Verdict) -> Verdict:
        """The verdict that was told first, which may be another's; the own one where the store hangs."""
        agreed = [own]

        def agree(store: Store) -> None:
            with contextlib.suppress(Exception):
                store.tell(_VERDICT, json.dumps(dataclasses.asdict(own)), is_last_word=True)
                agreed.append(from_plain(json.loads(store.told()[_VERDICT]), Verdict))

        if self._store is not None:
            thread = threading.Thread(target=agree, args=(self._store,), daemon=True)
            thread.start()
            thread.join(3 * _LOOK_SECONDS)
        return agreed[-1]

    def _leave(self, verdict: Verdict) -> None:
        """Says why, and ends the process with code 1; process 0 last: JAX ends the others when it goes."""
        self._report(f"error: {verdict.text}")
        innocent = [n for n in range(len(self._hosts)) if n not in verdict.processes]
        if verdict.processes and self._process == (innocent or [0])[0]:
            self._blame(list(dict.fromkeys(self._hosts[n] for n in verdict.processes)))
        if self._process == 0 and self._store is not None:
            time.sleep(3 * _LOOK_SECONDS)
        self._end(1)
