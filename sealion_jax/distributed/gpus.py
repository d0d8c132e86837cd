"""Which GPUs a process takes where several share a node, from what CUDA_VISIBLE_DEVICES shows it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

Share = tuple[tuple[int, ...] | None, int | None]
"""(which of the GPUs that CUDA shows, how many have to be seen); None: all, unknown."""

_DRIVER = Path("/proc/driver/nvidia/gpus")


def slurm_share(environ: Mapping[str, str], *, on_node: int, tasks: int, number: int) -> Share:
    """The share of a task, of which the node has so many: the only one takes all of the node's GPUs.

    Of several each takes a part by its local number, unless Slurm has given it its own already
    (--gpus-per-task, --gpu-bind), so that CUDA shows fewer than the node has.
    """
    if not on_node or _on_cpu(environ):
        return None, None
    if tasks == 1:
        return None, on_node
    shown = _num_shown(environ)
    if shown is not None and shown < on_node:
        return None, shown or max(on_node // tasks, 1)
    return _part(on_node, tasks=tasks, number=number)


def mpi_share(environ: Mapping[str, str], *, on_node: int | None, tasks: int, number: int) -> Share:
    """The same for mpirun, which gives no GPUs: a script around the command may have.

    Nobody says then how many the node's processes have together. Where CUDA shows one fewer than there are
    processes, they are its own; else they are everybody's.

    Args:
        on_node: GPUs of this machine, if that is known.
    """
    shown = _num_shown(environ)
    if _on_cpu(environ) or shown == 0:
        return None, None
    if tasks == 1:
        return None, shown or on_node
    if shown is not None and shown < tasks:
        return None, shown
    if shown or on_node:
        return _part(shown or on_node or 1, tasks=tasks, number=number)
    return (number,), None


def num_gpus() -> int | None:
    """GPUs of this machine by NVIDIA's driver, or None where there is none."""
    return len(list(_DRIVER.iterdir())) or None if _DRIVER.is_dir() else None


def _part(of: int, *, tasks: int, number: int) -> Share:
    share = max(of // tasks, 1)
    return tuple(one % of for one in range(number * share, (number + 1) * share)), share


def _num_shown(environ: Mapping[str, str]) -> int | None:
    shown = environ.get("CUDA_VISIBLE_DEVICES")
    return None if shown is None else len([one for one in shown.split(",") if one.strip()])


def _on_cpu(environ: Mapping[str, str]) -> bool:
    return environ.get("JAX_PLATFORMS", "").strip() == "cpu"
