"""Process 0 speaks for a run of several: what it finds, or the error it meets, reaches all."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sealion_jax.errors import UserError


def num_processes() -> int:
    """How many processes the run has; does not wake the devices of a process that is alone."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def on_first_process(action: Callable[[], Any]) -> Any:
    """What `action` returns (JSON) on process 0, on all processes; a UserError it raises is raised on all.

    Only process 0 calls `action`. With one process that is all there is to it. All processes must call this
    together, and not while another collective may run.
    """
    if num_processes() == 1:
        return action()
    answer: dict[str, Any] = {}
    failure: Exception | None = None
    if jax.process_index() == 0:
        try:
            answer = {"result": action()}
        except UserError as error:
            answer = {"user_error": str(error)}
        except Exception as error:  # must not leave the others waiting
            failure, answer = error, {"error": f"{type(error).__name__}: {error}"}
    answer = json.loads(_broadcast(json.dumps(answer).encode()))
    if failure is not None:
        raise failure
    if "user_error" in answer:
        raise UserError(answer["user_error"])
    if "error" in answer:
        raise RuntimeError(f"process 0 failed: {answer['error']}")
    return answer["result"]


def all_lines(lines: list[str]) -> list[str]:
    """The lines of all processes, in their order, on every process, each line once."""
    if num_processes() == 1:
        return lines
    own = np.frombuffer(json.dumps(lines).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.asarray(own.size, np.int32))).reshape(-1)
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: own.size] = own
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    everyone = [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]
    return list(dict.fromkeys(line for lines in everyone for line in lines))


def _broadcast(text: bytes) -> bytes:
    """Process 0's bytes, on all processes."""
    size = int(multihost_utils.broadcast_one_to_all(np.asarray(len(text), np.int32)))
    buffer = np.zeros(size, np.uint8)
    if jax.process_index() == 0:
        buffer[:] = np.frombuffer(text, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(buffer)).tobytes()
