"""Joining the processes of a run."""

from __future__ import annotations

from dataclasses import dataclass

import jax

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
                "give all of --coordinator-address, --num-processes and --process-id, or none of them"
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
