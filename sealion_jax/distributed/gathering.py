"""Process 0 while the processes of a run gather: who has come, who has not, and whether they agree."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sealion_jax.distributed.agreement import Reading, clock_warnings, disagreements, missing_text
from sealion_jax.distributed.words import (
    LINE_BYTES,
    LINE_SECONDS,
    TELL_SECONDS,
    Introduction,
    Verdict,
    decode,
    encode,
    read_introduction,
)

CLOCK_LIMIT_SECONDS = 2.0
_SEND_SECONDS = 5.0
_ANSWER_SECONDS = 3.0
"""A process that lives answers by then."""
_LATE_SECONDS = 10.0
"""What was refused before all had come is told to others so much longer."""


@dataclass(kw_only=True)
class _Guest:
    """A process that has come."""

    who: Introduction
    writer: asyncio.StreamWriter
    reading: Reading | None = None
    heard: asyncio.Event = field(default_factory=asyncio.Event)
    """Set whenever it says something."""


class PortTakenError(Exception):
    """Something on this machine listens at the port already."""


@dataclass(kw_only=True)
class Gathering:
    """One gathering; `run` gives its verdict, which every process that has come is told."""

    own: Introduction
    port: int
    hosts: Sequence[str] = ()
    nodes: Sequence[str] = ()
    """The machines of each process and of the run, where they are known, to name those that are missing."""
    asked_to_stop: Callable[[], bool] = lambda: False
    _guests: dict[int, _Guest] = field(default_factory=dict)
    _verdict: Verdict | None = None

    def run(self, limit_seconds: float, *, told_seconds: float) -> Verdict:
        """The verdict, after `limit_seconds` at the latest; messages speak of `told_seconds`.

        Raises:
            PortTakenError: at once; nobody was told anything.
        """
        return asyncio.run(self._run(time.monotonic() + limit_seconds, told_seconds))

    async def _run(self, deadline: float, told_seconds: float) -> Verdict:
        try:
            server = await asyncio.start_server(self._receive, sock=_listen(self.port), limit=LINE_BYTES)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortTakenError from error
            raise
        told = 0.0
        while self._verdict is None:
            if self.own.stop or self.asked_to_stop():
                self._verdict = _stopped_by(self.own)
            elif self._is_complete():
                self._verdict = self._judge()
            elif time.monotonic() > deadline:
                self._verdict = self._too_late(told_seconds)
            elif time.monotonic() - told > TELL_SECONDS:
                told = time.monotonic()
                await self._tell({"waiting": f"waiting for {self._missing()}"})
            else:
                await asyncio.sleep(0.02)
        verdict = self._verdict
        if verdict.verdict == "refused":
            await self._tell(dataclasses.asdict(verdict))
            await self._wait_for_late_ones(min(deadline, time.monotonic() + _LATE_SECONDS))
        # First the port is given free: JAX's service takes it over as soon as the others know.
        server.close()
        if verdict.verdict != "refused":
            await self._tell(dataclasses.asdict(verdict))
        for guest in self._guests.values():
            guest.writer.close()
            with contextlib.suppress(Exception):
                await asyncio.wait_for(guest.writer.wait_closed(), _SEND_SECONDS)
        return verdict

    async def _wait_for_late_ones(self, deadline: float) -> None:
        """Stays for those that have not come yet: they would wait in vain until their own time is up."""
        while time.monotonic() < deadline and not set(range(1, self.own.processes)) <= set(self._guests):
            await asyncio.sleep(0.02)

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Speaks with whoever has connected until the end of the gathering, or of the connection."""
        guest = None
        with contextlib.suppress(OSError, ValueError, TimeoutError):
            who = read_introduction(await asyncio.wait_for(reader.readline(), LINE_SECONDS))
            if who is not None:
                await self._forget_if_gone(who)
                guest = self._welcome(who, writer)
            if guest is not None:
                guest.reading = await _read_clock(reader, writer)
                while line := await reader.readline():
                    guest.heard.set()
                    if (decode(line) or {}).get("stop"):
                        self._verdict = self._verdict or _stopped_by(guest.who)
        if self._verdict is None:
            if guest is not None and self._guests.get(guest.who.process) is guest:
                del self._guests[guest.who.process]
            writer.close()

    async def _forget_if_gone(self, who: Introduction) -> None:
        """Forgets the guest of this number if it answers no more: `who` was started in its place.

        The connection of a host that lost its power, or its network, is not closed by anybody.
        """
        there = self._guests.get(who.process)
        if there is None or who.job != self.own.job:
            return
        there.heard.clear()
        there.writer.write(encode({"ask": "clock"}))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(there.heard.wait(), _ANSWER_SECONDS)
        if not there.heard.is_set() and self._verdict is None and self._guests.get(who.process) is there:
            del self._guests[who.process]
            there.writer.transport.abort()

    def _welcome(self, who: Introduction, writer: asyncio.StreamWriter) -> _Guest | None:
        """The process that introduces itself so; None if it does not belong here."""
        if who.job != self.own.job:
            writer.write(encode({"other": self.own.job or "a run that no scheduler started"}))
            return None
        guest = _Guest(who=who, writer=writer)
        if self._verdict is not None:
            if self._verdict.verdict == "refused":
                self._guests.setdefault(who.process, guest)
                writer.write(encode(dataclasses.asdict(self._verdict)))
            return None
        there = self._guests.get(who.process)
        double = self.own if who.process == 0 else None if there is None else there.who
        # Whoever is refused has to hear of it too, and the numbers below 0 are nobody else's.
        self._guests[-1 - len(self._guests) if double else who.process] = guest
        if who.processes != self.own.processes:
            self._refuse(
                f"{who.describe()} was started as one of {who.processes} processes, {self.own.describe()} as "
                f"one of {self.own.processes}; give all of them the same --num-processes"
            )
        elif not 0 <= who.process < self.own.processes:
            self._refuse(
                f"{who.describe()} was started, but there are {self.own.processes} processes, numbered from "
                "0; start as many as --num-processes says"
            )
        elif double is not None:
            self._refuse(
                f"two processes were started as process {who.process}: pid {double.pid} on {double.host} and "
                f"pid {who.pid} on {who.host}; give each process its own --process-id, or stop the run that "
                "is still there"
            )
        elif who.stop:
            self._verdict = self._verdict or _stopped_by(who)
        return guest

    def _refuse(self, text: str) -> None:
        self._verdict = self._verdict or Verdict(verdict="refused", text=text)

    def _is_complete(self) -> bool:
        """Whether all have come, and all clocks were read."""
        return len(self._guests) == self.own.processes - 1 and all(
            guest.reading is not None for guest in self._guests.values()
        )

    def _present(self) -> list[Introduction]:
        here = [self.own, *(guest.who for number, guest in self._guests.items() if number > 0)]
        return sorted(here, key=lambda who: who.process)

    def _missing(self) -> str:
        return missing_text(self._present(), processes=self.own.processes, hosts=self.hosts, nodes=self.nodes)

    def _judge(self) -> Verdict:
        """What follows when all are there."""
        present = self._present()
        lines = disagreements(present)
        if lines:
            return Verdict(verdict="refused", text="\n".join(lines))
        readings = {guest.who.process: guest.reading for guest in self._guests.values() if guest.reading}
        readings[0] = Reading(ahead_seconds=0.0, within_seconds=0.0)
        return Verdict(
            verdict="go",
            warnings=tuple(clock_warnings(present, readings, limit_seconds=CLOCK_LIMIT_SECONDS)),
            hosts=tuple(who.host for who in present),
        )

    def _too_late(self, limit_seconds: float) -> Verdict:
        """What follows when the time is up."""
        present = self._present()
        text = (
            f"{self._missing()} did not come within {limit_seconds:.0f} s; there were "
            f"{', '.join(f'{who.process} ({who.host})' for who in present)}. Look at the logs of those that "
            "are missing: they were not started, have failed, or cannot reach process 0 at port "
            f"{self.port}; with a larger --join-timeout-seconds they are waited for longer"
        )
        return Verdict(verdict="refused", text="\n".join([text, *disagreements(present)]))

    async def _tell(self, message: dict[str, Any]) -> None:
        """Tells all that have come; who does not listen is waited for no longer than a few seconds."""
        line = encode(message)
        guests = list(self._guests.values())
        for guest in guests:
            with contextlib.suppress(OSError, RuntimeError):
                guest.writer.write(line)
        drains = (asyncio.wait_for(guest.writer.drain(), _SEND_SECONDS) for guest in guests)
        await asyncio.gather(*drains, return_exceptions=True)


def _listen(port: int) -> socket.socket:
    """A socket at this port of all of the machine's addresses, as JAX's service will have it."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", port), backlog=1024)


async def _read_clock(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Reading:
    """The other's clock against this one's, as it was between question and answer."""
    asked = time.time()
    writer.write(encode({"ask": "clock"}))
    answer = decode(await asyncio.wait_for(reader.readline(), LINE_SECONDS))
    answered = time.time()
    if answer is None or not isinstance(answer.get("clock"), int | float):
        raise ValueError("no clock")
    return Reading(
        ahead_seconds=float(answer["clock"]) - (asked + answered) / 2, within_seconds=(answered - asked) / 2
    )


def _stopped_by(who: Introduction) -> Verdict:
    return Verdict(
        verdict="stop",
        text=f"{who.describe()} was asked to stop while the processes gathered; run me again",
    )
