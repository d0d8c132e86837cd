"""What processes say to each other while they gather: one JSON object a line, over plain TCP.

JAX's own service cannot say who is missing: when somebody is, it ends the processes that are there with
SIGABRT. So they gather here first, at the very port that JAX's service then takes over.

    a process   {"protocol", "job", "process", "processes", "host", "pid", "stop", "facts"}
    process 0   {"ask": "clock"}                    answered at once with {"clock": seconds since 1970}
    process 0   {"waiting": text}                   every second
    a process   {"stop": true}                      when it is asked to stop meanwhile
    process 0   {"verdict": "go" | "refused" | "stop", "text", "warnings", "hosts"}, and the end

The answers to a process of another job are {"other": its name}, and the end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from sealion_jax.config_tree import field_types, from_plain
from sealion_jax.errors import UserError

PROTOCOL = "sealion_jax join 1"
LINE_BYTES = 4 * 2**20
"""No line is longer; the longest holds a recipe, a few ten thousand bytes."""
LINE_SECONDS = 10.0
"""A connection on which nothing comes for so long is given up."""
TELL_SECONDS = 1.0
"""So often a process that waits is told for whom."""


@dataclass(frozen=True, kw_only=True)
class Introduction:
    """Who a process is, and what it is about to do."""

    process: int
    processes: int
    host: str
    pid: int
    facts: dict[str, str]
    """What must be the same for all, by what it is called: recipe, run directory, versions."""
    job: str = ""
    stop: bool = False
    """It was asked to stop before it joined."""
    protocol: str = PROTOCOL

    def describe(self) -> str:
        """ "process 3 on node7"."""
        return f"process {self.process} on {self.host}"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How the gathering ends, the same for all."""

    verdict: Literal["go", "refused", "stop"]
    text: str = ""
    warnings: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    """Of each process, when all are there."""


Word = TypeVar("Word", Introduction, Verdict)


def encode(message: Mapping[str, Any]) -> bytes:
    """The message as a line."""
    return json.dumps(message).encode() + b"\n"


def decode(line: bytes) -> dict[str, Any] | None:
    """The message of a line, or None if it is none: somebody else speaks."""
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


def read_introduction(line: bytes) -> Introduction | None:
    """Who introduces itself with this line, or None if it is not one of us."""
    message = decode(line)
    if message is None or message.get("protocol") != PROTOCOL:
        return None
    return _read(message, Introduction)


def read_verdict(message: Mapping[str, Any]) -> Verdict | None:
    """The verdict that a message of process 0 is, or None if it is another one."""
    return _read(message, Verdict) if "verdict" in message else None


def _read(message: Mapping[str, Any], cls: type[Word]) -> Word | None:
    """The message as one of ours, without what another version says more, or None if it is none.

    So that another version is told as such, by the digest of its sources.
    """
    try:
        return from_plain({name: message[name] for name in field_types(cls) if name in message}, cls)
    except UserError:
        return None
