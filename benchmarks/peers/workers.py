"""The processes that take training steps: how each is started, asked and ended."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers.turns import Job

HERE = Path(__file__).parent
OURS = "sealion_jax"
REFERENCE = "transformers"


@dataclass(frozen=True, kw_only=True)
class Peer:
    """How a worker is started."""

    script: str
    environment: str | None = None
    """Folder of its virtual environment; None is this interpreter's."""
    requirements: tuple[str, ...] = ()
    on_gpu: tuple[Mapping[str, Any], ...] = ()
    """Options to take there, the next ones when those before are out of memory; none: it takes no part."""

    def python(self) -> str:
        """Its interpreter."""
        return sys.executable if self.environment is None else str(Path(self.environment) / "bin/python")


PEERS = {
    OURS: Peer(
        script="run_sealion.py",
        on_gpu=tuple({"remat": remat} for remat in ("none", "dots", "layer", "block")),
    ),
    REFERENCE: Peer(script="run_transformers.py", on_gpu=({}, {"checkpointing": True})),
    "tunix": Peer(
        script="run_tunix.py", environment=".venv-peers-tunix", requirements=("google-tunix==0.1.7",)
    ),
    "easydel": Peer(
        script="run_easydel.py",
        environment=".venv-peers-easydel",
        # Its Gemma 3 imports the last two, which it does not declare.
        requirements=("easydel==0.3.0", "torch==2.13.0", "pillow"),
    ),
}


class WorkerError(RuntimeError):
    """A worker ended before it answered; its last words say why."""

    def __init__(self, name: str, log: str) -> None:
        super().__init__(f"{name} ended: {log[-3000:]}")
        self.out_of_memory = any(words in log.lower() for words in ("out of memory", "resource_exhausted"))


class Worker:
    """A process that takes steps when asked."""

    def __init__(self, name: str, job: Job, folder: Path) -> None:
        self.name, self.log = name, folder / f"{name}.log"
        file = folder / f"{name}.json"
        job.write(file)
        environment = {**os.environ, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
        if PEERS[name].environment is not None:
            environment.pop("PYTHONPATH", None)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [PEERS[name].python(), str(HERE / PEERS[name].script), str(file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
            )
        self.begun: dict[str, Any] = {}

    def answer(self) -> dict[str, Any]:
        """The next answer; waits for it."""
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise WorkerError(self.name, self.log.read_text())
        return json.loads(line)

    def take(self, steps: int) -> dict[str, Any]:
        """Seconds of each of some steps, and what the worker knows of its memory."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        """Ends the process, and waits until it has."""
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def started(name: str, job: Job, folder: Path) -> Iterator[Worker]:
    """A worker that has compiled and taken its first steps; ended afterwards."""
    worker = Worker(name, job, folder)
    try:
        worker.begun = worker.answer()
        losses = ", ".join(f"{loss:.5f}" for loss in worker.begun["losses"])
        seconds = worker.begun["seconds_to_begin"]
        print(f"{name}: {worker.begun['settings']}; losses {losses}; began in {seconds:.0f} s", flush=True)
        yield worker
    finally:
        worker.end()


def install() -> None:
    """Makes the environments that are not there yet, in this folder."""
    for peer in PEERS.values():
        if peer.environment is not None and not Path(peer.python()).exists():
            subprocess.run([sys.executable, "-m", "venv", peer.environment], check=True)
            subprocess.run([peer.python(), "-m", "pip", "install", *peer.requirements], check=True)
