"""What Slurm tells a task: its number, the others' nodes and its share of the node's GPUs.

The variables are those of srun's manual page, "OUTPUT ENVIRONMENT VARIABLES". Only tasks of a step have a
place among others. The shell of sbatch or salloc is none, though it has SLURM_PROCID (0) and the job's
SLURM_NTASKS; the shell that salloc opens in a step of its own is the only task of that step. So the step's
own numbers count here, never the job's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from sealion_jax.distributed.cluster import Cluster, check_place, half_told, whole, with_restarts
from sealion_jax.distributed.gpus import slurm_share
from sealion_jax.errors import UserError

NEEDED = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_PROCID")
_OF_A_STEP = ("SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST")

# Above the ports that Linux gives to outgoing connections (32768 to 60999), below the end.
_FIRST_PORT, _NUM_PORTS = 61440, 4096


def slurm_cluster(environ: Mapping[str, str]) -> Cluster | None:
    """The step that this process is a task of, or None if it is not a task of any.

    Raises:
        UserError: it is one of several, and its environment does not tell all, or what cannot be.
    """
    missing = [name for name in NEEDED if not environ.get(name)]
    if missing:
        if _is_one_of_several(environ):
            raise half_told("srun", missing[0])
        return None
    tasks_in_all, own_number = (_number(environ, name) for name in ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"))
    check_place(own_number, tasks_in_all, number_name="SLURM_PROCID", of_name="SLURM_STEP_NUM_TASKS")
    job, step = environ["SLURM_JOB_ID"], environ["SLURM_STEP_ID"]
    restarts = _number(environ, "SLURM_RESTART_COUNT")
    nodes = expand_nodes(environ["SLURM_STEP_NODELIST"])
    tasks = _tasks_per_node(environ, len(nodes))
    node_number = _number(environ, "SLURM_NODEID")
    own_tasks = tasks[node_number] if node_number < len(tasks) else 1
    visible, expected = slurm_share(
        environ,
        on_node=_number(environ, "SLURM_GPUS_ON_NODE"),
        tasks=own_tasks,
        number=_number(environ, "SLURM_LOCALID"),
    )
    return Cluster(
        kind="slurm",
        name=with_restarts(f"slurm job {job}", restarts),
        # Another step, or the same one before it was requeued, is another run.
        word=f"slurm {environ.get('SLURM_CLUSTER_NAME', '')} {job}.{step} restart {restarts}",
        coordinator_address=f"{nodes[0]}:{port_of(whole(job, 'SLURM_JOB_ID'), step, restarts)}",
        num_processes=tasks_in_all,
        process_id=own_number,
        node=environ.get("SLURMD_NODENAME"),
        nodes=nodes,
        hosts=_hosts(environ, nodes, tasks),
        job_id=job,
        restarts=restarts,
        visible_devices=visible,
        expected_devices=expected,
        expected_platform=None if expected is None else "gpu",
        expected_by="Slurm (SLURM_GPUS_ON_NODE)",
    )


def note_on_lone_process(environ: Mapping[str, str]) -> str | None:
    """A line for a job of several nodes or tasks whose command was not started with srun."""
    if "SLURM_JOB_ID" not in environ or environ.get("SLURM_STEP_ID"):
        return None
    nodes, tasks = (_number(environ, name, 1) for name in ("SLURM_JOB_NUM_NODES", "SLURM_NTASKS"))
    if max(nodes, tasks) == 1:
        return None
    return (
        f"slurm job {environ['SLURM_JOB_ID']} has {nodes} nodes and {tasks} tasks, but this process was not "
        "started by srun and trains alone; begin the command with srun to use them all"
    )


def _is_one_of_several(environ: Mapping[str, str]) -> bool:
    """Whether this is a task of a step of several, by those of the variables that are there."""
    if not any(environ.get(name) for name in _OF_A_STEP):
        return False
    if environ.get("SLURM_STEP_NUM_TASKS"):
        return _number(environ, "SLURM_STEP_NUM_TASKS") > 1
    numbers = [_number(environ, name) for name in ("SLURM_STEP_NUM_NODES", "SLURM_NTASKS")]
    return max(*numbers, _number(environ, "SLURM_PROCID") + 1) > 1


def port_of(job: int, step: str, restarts: int) -> int:
    """The port of process 0, which all tasks work out alike: another one for each job, step and restart.

    Consecutive jobs on a node differ, and a job that is requeued does not meet its own predecessor's.
    """
    number = int(step) if step.isdecimal() else 0
    return _FIRST_PORT + (job + 1009 * restarts + 101 * number) % _NUM_PORTS


def expand_nodes(text: str) -> tuple[str, ...]:
    """The names that a Slurm node list stands for: n[001-003,7],m1 is n001, n002, n003, n7, m1.

    Raises:
        UserError: it is not such a list.
    """
    # Commas within brackets separate numbers, those outside names.
    parts = re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text)
    names = tuple(name for part in parts for name in _expand(part))
    if not names or ",".join(parts) != text or not all(re.fullmatch(r"[\w.\-]+", name) for name in names):
        raise UserError(f"SLURM_STEP_NODELIST {text!r} is not a list of nodes such as n[001-003],m1")
    return names


def _expand(name: str) -> list[str]:
    """One name, whose first pair of brackets is replaced by each of its numbers, and so on."""
    match = re.fullmatch(r"([^\[\]]*)\[([\d,\-]+)\](.*)", name)
    if match is None:
        return [name]
    before, numbers, after = match.groups()
    rest = _expand(after) if after else [""]
    found = []
    for part in numbers.split(","):
        first, dash, last = part.partition("-")
        last = last if dash else first
        if not first.isdecimal() or not last.isdecimal():
            return [name]
        for number in range(int(first), int(last) + 1):
            found += [f"{before}{number:0{len(first)}d}{tail}" for tail in rest]
    return found


def _tasks_per_node(environ: Mapping[str, str], num_nodes: int) -> list[int]:
    """Tasks on each node of the step, from "2(x3),1"; one each where that is not told."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE") or f"1(x{num_nodes})"
    tasks: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        tasks += [int(count)] * int(times or 1)
    return tasks


def _hosts(environ: Mapping[str, str], nodes: tuple[str, ...], tasks: list[int]) -> tuple[str, ...]:
    """The node of each task where that is sure: one task a node, or tasks dealt out in blocks."""
    in_blocks = (environ.get("SLURM_DISTRIBUTION") or "block").split(":")[0].startswith("block")
    if len(tasks) != len(nodes) or not (in_blocks or set(tasks) == {1}):
        return ()
    return tuple(node for node, count in zip(nodes, tasks, strict=True) for _ in range(count))


def _number(environ: Mapping[str, str], name: str, otherwise: int = 0) -> int:
    return whole(environ[name], name) if environ.get(name) else otherwise
