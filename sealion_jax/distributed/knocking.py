"""The other processes while the processes of a run gather: each knocks at process 0's door, and waits."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

from sealion_jax.distributed.words import (
    LINE_BYTES,
    LINE_SECONDS,
    Introduction,
    Verdict,
    decode,
    encode,
    read_verdict,
)

_PAUSE_SECONDS = 0.2
GRACE_SECONDS = 3.0
"""Process 0's word on who is missing is waited for so much longer."""


class _Lost(Exception):  # noqa: N818 (the next knock may do)
    """Process 0 was not reached, or is gone; says why."""


@dataclasses.dataclass(kw_only=True)
class Knocking:
    """One process that wants in; `run` gives the verdict that it is told."""

    own: Introduction
    host: str
    port: int
    asked_to_stop: Callable[[], bool] = lambda: False
    _reason: str = "there was no time to try"
    _waited_for: str | None = None

    def run(self, limit_seconds: float) -> Verdict:
        """The verdict, a few seconds after `limit_seconds` at the latest."""
        deadline = time.monotonic() + limit_seconds + GRACE_SECONDS
        while time.monotonic() < deadline:
            if self.own.stop or self.asked_to_stop():
                return Verdict(
                    verdict="stop",
                    text="asked to stop before process 0 was reached; run me again",
                )
            verdict = self.knock(deadline)
            if verdict is not None:
                return verdict
            time.sleep(min(_PAUSE_SECONDS, max(deadline - time.monotonic(), 0)))
        return Verdict(verdict="refused", text=self._too_late(limit_seconds))

    def knock(self, deadline: float) -> Verdict | None:
        """The verdict, if process 0 is there to tell one."""
        try:
            return self._knock(deadline)
        except _Lost as lost:
            self._reason = str(lost)
            return None

    def wait_for_service(self, limit_seconds: float) -> bool:
        """Whether something listens at the port in time: process 0 starts JAX's service after its verdict.

        JAX would find it itself, but pauses longer between its tries.
        """
        deadline = time.monotonic() + limit_seconds
        while time.monotonic() < deadline:
            try:
                socket.create_connection((self.host, self.port), timeout=1.0).close()
                return True
            except OSError:
                time.sleep(0.02)
        return False

    def _knock(self, deadline: float) -> Verdict:
        """Introduces this process, and waits for the verdict."""
        try:
            patience = min(LINE_SECONDS, max(deadline - time.monotonic(), 0.1))
            connection = socket.create_connection((self.host, self.port), timeout=patience)
        except socket.gaierror as error:
            raise _Lost(f"the name {self.host} is not known here ({error.strerror})") from error
        except TimeoutError as error:
            raise _Lost("no answer at all: a firewall, or a host that is down") from error
        except OSError as error:
            raise _Lost(
                f"{error.strerror or error}: process 0 was not started there, has ended, or waits elsewhere"
            ) from error
        with connection:
            try:
                connection.sendall(encode(dataclasses.asdict(self.own)))
                return self._wait(connection, deadline)
            except OSError as error:
                raise _Lost(f"process 0 hung up ({error.strerror or error})") from error

    def _wait(self, connection: socket.socket, deadline: float) -> Verdict:
        """The verdict; answers what process 0 asks meanwhile."""
        told_to_stop = False
        for message in _messages(connection, deadline):
            if message is not None and "ask" in message:
                connection.sendall(encode({"clock": time.time()}))
            elif message is not None and "waiting" in message:
                self._waited_for = str(message["waiting"])
            elif message is not None and "other" in message:
                raise _Lost(f"{message['other']} waits there, not this run ({self.own.job or 'flags'})")
            elif message is not None:
                verdict = read_verdict(message)
                if verdict is None:
                    raise _Lost("what answers there is another version of this program, or another one")
                return verdict
            if self.asked_to_stop() and not told_to_stop:
                told_to_stop = True
                connection.sendall(encode({"stop": True}))
        raise _Lost("process 0 has hung up, or does not speak any more")

    def _too_late(self, limit_seconds: float) -> str:
        if self._waited_for is not None:
            return (
                f"{self.own.describe()} waited for {limit_seconds:.0f} s; process 0, at "
                f"{self.host}:{self.port}, was {self._waited_for} then. Look at the "
                "logs of those, or let all wait for longer with --join-timeout-seconds"
            )
        return (
            f"process 0 did not come: {self.own.describe()} could not reach it at {self.host}:{self.port} "
            f"within {limit_seconds:.0f} s; {self._reason}. Look at the log of process 0, and whether "
            "--coordinator-address (or what the scheduler says) is its host"
        )


def _messages(connection: socket.socket, deadline: float) -> Iterator[dict[str, Any] | None]:
    """What process 0 says, and None now and then while it says nothing; ends when nothing more will come.

    Raises:
        _Lost: what it says is not of our kind.
    """
    connection.settimeout(0.5)
    heard, buffer = time.monotonic(), b""
    while time.monotonic() < min(deadline, heard + LINE_SECONDS):
        chunk = None
        with contextlib.suppress(TimeoutError):
            chunk = connection.recv(1 << 16)
        if chunk == b"":
            return
        if chunk is None:
            yield None
            continue
        heard = time.monotonic()
        *lines, buffer = (buffer + chunk).split(b"\n")
        for line in lines:
            message = decode(line)
            if message is None:
                raise _Lost(_NOT_US)
            yield message
        if len(buffer) > LINE_BYTES or (buffer and not buffer.startswith(b"{")):
            raise _Lost(_NOT_US)


_NOT_US = (
    "something else listens there: another program, or a run that has all its processes already, so "
    "that this one is too many"
)
