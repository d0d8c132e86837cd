"""Joining the processes of a run, and agreeing among them when to stop."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from types import FrameType

import jax
from jax.experimental import multihost_utils

from sealion_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """How this process finds the others; with neither field set the run has one process."""

    coordinator_address: str | None = None
    """host:port of process 0."""
    num_processes: int | None = None
    process_id: int | None = None
    join_timeout_seconds: int = 300

    def __post_init__(self) -> None:
        given = [self.coordinator_address, self.num_processes, self.process_id]
        if any(value is not None for value in given) and any(value is None for value in given):
            raise UserError(
                "give all of --distributed.coordinator-address, --distributed.num-processes and "
                "--distributed.process-id, or none of them"
            )


def join(config: DistributedConfig) -> None:
    """Joins the run's other processes, if there are any; before anything else touches JAX.

    Processes on CPUs talk through gloo.
    """
    if config.coordinator_address is None:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            config.coordinator_address,
            config.num_processes,
            config.process_id,
            initialization_timeout=config.join_timeout_seconds,
        )
    except RuntimeError as error:
        raise UserError(
            f"process {config.process_id} of {config.num_processes} could not join at "
            f"{config.coordinator_address} within {config.join_timeout_seconds} s: {error}"
        ) from error


class StopRequest:
    """Whether the run has been asked to stop (SIGTERM), as all its processes see it.

    With several processes JAX's preemption service picks a step that none has passed yet, so all of them save
    the same one.
    """

    def __init__(self) -> None:
        self._signalled = False
        self._answers: dict[int, bool] = {}
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._note)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self._signalled = True

    def requested(self, step: int) -> bool:
        """Whether the run stops after this step; every process asks for every step, in order."""
        if step not in self._answers:
            if jax.process_count() == 1:
                answer = self._signalled
            else:
                answer = multihost_utils.reached_preemption_sync_point(step)
            self._answers = {step: answer}
        return self._answers[step]
