"""A real Slurm on this machine, and the tiny run as jobs of it, through the shipped batch script."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sealion_jax.checkpoint.arrays import leaf_shapes, read_leaf
from tests.tiny_run import losses_of, make_world

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "slurm" / "train.sbatch"
CLUSTER = ROOT / "tests" / "slurm" / "cluster.sh"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "ss")


def missing_for_slurm() -> str | None:
    """What a cluster on this machine lacks, or None if one can be brought up."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        return f"no {', '.join(missing)}: apt install slurm-wlm munge iproute2"
    return None if os.geteuid() == 0 else "slurmd needs root"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the tiny run is trained in a drill."""

    steps: int = 40
    batch: int = 16
    interval: int = 5

    def options(self) -> list[str]:
        """The run's options; logged at every step, so that losses can be compared."""
        return [
            *("--steps", str(self.steps), "--global-batch-size", str(self.batch)),
            *("--checkpoints.interval-steps", str(self.interval), "--logging.interval-steps", "1"),
            *("--evaluation.sets", "none", "--mesh.data", "2", "--mesh.fsdp", "2"),
        ]


class Slurm:
    """A cluster of three nodes; `cluster()` brings it up and down."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings = folder, settings
        self.undisturbed_seconds = 0.0
        """How long the run on two nodes took, from its submission to its end, once it was measured."""
        world = folder / "world"
        world.mkdir(parents=True, exist_ok=True)
        self.recipe = make_world(world).recipe
        self.environment = {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("SLURM_", "SBATCH_"))
            },
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
            "SLURM_CONF": str(self.cluster_folder / "slurm.conf"),
        }

    @property
    def cluster_folder(self) -> Path:
        """Where the daemons' files are."""
        return self.folder / "cluster"

    def bring(self, action: str) -> None:
        """Runs cluster.sh; `up` also starts a slurmd that was killed."""
        subprocess.run([CLUSTER, action, self.cluster_folder], env=self.environment, check=True, timeout=120)

    def call(self, *command: object) -> str:
        """What one of Slurm's commands prints."""
        return subprocess.run(
            [*map(str, command)],
            env=self.environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=60,
        ).stdout

    def train(self, name: str, *sbatch: str, nodes: int = 2, devices: int = 2) -> Job:
        """The tiny run, submitted: run directory `name`, so many nodes of so many CPU devices each."""
        environment = {
            **self.environment,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "PYTHON": sys.executable,
            "LOG_DIR": str(self.folder / "logs"),
        }
        command = ["sbatch", "--parsable", "--nodes", str(nodes), f"--output={self.folder}/{name}.out"]
        command += [*sbatch, str(SCRIPT), self.recipe, "--run-dir", str(self.folder / name)]
        command += self.settings.options()
        submitted = subprocess.run(
            command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=60
        )
        return Job(slurm=self, number=int(submitted.stdout.split(";")[0]), name=name, submitted=time.time())


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run as a job."""

    slurm: Slurm
    number: int
    name: str
    submitted: float

    @property
    def run_dir(self) -> Path:
        return self.slurm.folder / self.name

    @property
    def log(self) -> str:
        """What the batch script said, over all starts."""
        path = self.slurm.folder / f"{self.name}.out"
        return path.read_text() if path.exists() else ""

    def rank_log(self, rank: int) -> str:
        """What a rank said, over all starts."""
        path = self.slurm.folder / "logs" / f"slurm-{self.number}" / f"{rank}.log"
        return path.read_text() if path.exists() else ""

    def fields(self) -> dict[str, str]:
        """What Slurm knows of it."""
        line = self.slurm.call("scontrol", "show", "job", "--oneliner", self.number)
        return dict(part.split("=", 1) for part in line.split() if "=" in part)

    @property
    def restarts(self) -> int:
        return int(self.fields()["Restarts"])

    def wait_for(self, what: str, condition: Callable[[], bool], *, seconds: float) -> None:
        """Waits until it is so; fails with the logs if it is not in time."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"job {self.number} ({self.name}): no {what} within {seconds:.0f} s\n{self.log}\n"
                    f"--- rank 0\n{self.rank_log(0)[-3000:]}\n--- {self.fields()}"
                )
            time.sleep(0.2)

    def wait_for_step(self, step: int) -> None:
        """Waits until the checkpoint of this step, or a later one, is complete."""
        self.wait_for(f"checkpoint {step}", lambda: self.newest() >= step, seconds=240)

    def newest(self) -> int:
        """The step of the newest complete checkpoint; 0: there is none."""
        found = self.run_dir.glob("checkpoints/*/digests.json")
        return max((int(path.parent.name) for path in found if path.parent.name.isdecimal()), default=0)

    def finish(self, *, seconds: float = 420) -> str:
        """Slurm's word for how it ended, once it has."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")
        self.wait_for("end", lambda: self.fields()["JobState"] in ends, seconds=seconds)
        return self.fields()["JobState"]

    def tasks(self, *, start: int = 0) -> dict[int, int]:
        """Rank -> pid of the training processes that live, of this start of the job."""
        found = {}
        for pid, environment in _processes():
            if (
                environment.get("SLURM_JOB_ID") == str(self.number)
                and environment.get("SLURM_CONF") == self.slurm.environment["SLURM_CONF"]
                and environment.get("SLURM_RESTART_COUNT", "0") == str(start)
                and "SLURM_PROCID" in environment
                and environment.get("SLURM_STEP_ID") == "0"
                and "sealion_jax.train" in _command(pid)
                and _command(pid)[0] != "srun"
            ):
                found[int(environment["SLURM_PROCID"])] = pid
        return found

    def slurmd_pid(self, node: str) -> int:
        """The daemon of a node."""
        return int((self.slurm.cluster_folder / f"{node}.pid").read_text())


@contextlib.contextmanager
def cluster(folder: Path, settings: Settings) -> Iterator[Slurm]:
    """A cluster that is up, and taken down in the end with all that runs in it."""
    slurm = Slurm(folder, settings)
    try:
        slurm.bring("up")
        yield slurm
    finally:
        slurm.bring("down")


def kill_hard(pid: int) -> None:
    """SIGKILL."""
    os.kill(pid, signal.SIGKILL)


def difference(run: Path, reference: Path, *, steps: int) -> float:
    """The largest relative difference of a loss; 0.0 means that every bit of every step's is the same.

    Raises:
        AssertionError: a step is missing in one of them.
    """
    losses, expected = losses_of(run), losses_of(reference)
    for name, found in ((run, losses), (reference, expected)):
        assert sorted(found) == list(range(1, steps + 1)), f"{name} has steps {sorted(found)}"
    return max(abs(losses[step] - expected[step]) / abs(expected[step]) for step in expected)


def same_weights(run: Path, reference: Path, *, steps: int) -> bool:
    """Whether every bit of the final weights and of the optimizer's state is the same."""
    for tree in ("params", "optimizer"):
        ours, theirs = (folder / "checkpoints" / str(steps) for folder in (run, reference))
        shapes = leaf_shapes(ours, tree=tree)
        if shapes != leaf_shapes(theirs, tree=tree):
            return False
        for name in shapes:
            left, right = (np.asarray(read_leaf(step, name, tree=tree)) for step in (ours, theirs))
            if left.tobytes() != right.tobytes():
                return False
    return True


def starts_from(job: Job) -> list[int]:
    """The steps after which the job's later starts went on."""
    return [int(step) for step in re.findall(r"^resuming after step (\d+)", job.rank_log(0), re.MULTILINE)]


def _processes() -> Iterator[tuple[int, dict[str, str]]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                words = (entry / "environ").read_bytes().split(b"\0")
                pairs = (word.decode(errors="replace").partition("=") for word in words)
                yield int(entry.name), {name: value for name, _, value in pairs}


def _command(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        return [Path(words[0]).name, *words[1:]]
    return [""]
