"""This machine: which process is meant by a pid that was written down, and what memory programs can have."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def this_machine() -> str:
    """What pids are relative to: boot and process namespace; the host's name where there is no /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def process_start(pid: int) -> str | None:
    """When process `pid` started, in an arbitrary count; None if there is none (a zombie is none)."""
    state = _stat(pid)
    if state is not None:
        return None if state[0] in "ZX" else state[19]
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return ""
    return ""


def lives_here(*, machine: str, pid: int, start: str) -> bool | None:
    """Whether the process that wrote this down lives; None if it is of another machine or boot."""
    if not machine or machine != this_machine():
        return None
    return process_start(pid) == start


def is_stopped(pid: int) -> bool:
    """Whether a process of this machine is stopped (SIGSTOP, a debugger); False where nobody can tell."""
    state = _stat(pid)
    return state is not None and state[0] in "Tt"


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/<pid>/stat after the command's name; None if there is no such file."""
    try:
        # The name may hold spaces and parentheses; the fields after it do not.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Memory that can be had without swapping, the page cache among it; None where Linux does not tell."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
