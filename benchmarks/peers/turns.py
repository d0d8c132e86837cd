"""What each training step under measurement is told, and how it takes its turn; imports NumPy alone.

A worker is a process with an environment of its own: it reads its job, builds its step, takes the first steps
(those compile), tells their losses, and then sleeps until it is asked for more. So only one of them works at
a time, and each is measured many times during one run.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Batch = dict[str, np.ndarray]
"""tokens, targets, positions and segment_ids [rows, tokens], int32; every target is learned."""

CHECKED_STEPS = 3
"""First steps whose losses are compared: the second depends on the gradients, the third on Adam's moments."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """The work that all of them do: shapes, data, first weights, and the optimizer."""

    rows: int
    tokens: int
    """Of a row."""
    model: Mapping[str, Any]
    """Fields of sealion_jax's Gemma3Config."""
    batch: str
    """File of the arrays of `Batch`."""
    weights: str | None
    """Hugging Face directory, float32; None draws weights."""
    on_gpu: bool = False
    """Computes in bfloat16 there, with float32 weights and moments."""
    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    """Of matrices; norms are not decayed."""
    max_grad_norm: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of this worker alone."""

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    def read_batch(self) -> Batch:
        with np.load(self.batch) as arrays:
            return dict(arrays)


@dataclass(frozen=True, kw_only=True)
class Built:
    """A training step ready to be taken."""

    step: Callable[[], float]
    """Takes a step, waits until all of it is done, the weights too, and gives the loss before it."""
    versions: Mapping[str, str]
    settings: str
    """What was chosen for speed, in words."""
    same_weights: bool
    """Whether it began with the job's weights."""
    peak_bytes: Callable[[], int | None] = lambda: None
    """Most memory of the accelerator that was in use."""


def serve(build: Callable[[Job], Built]) -> None:
    """Builds the step of the job that the command line names, then takes steps as stdin asks for them.

    Lines on stdin are numbers of steps; each is answered by their seconds. Answers are JSON, a line each, on
    what was stdout; all else that is printed goes to stderr.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    started = time.perf_counter()
    built = build(Job(**json.loads(Path(sys.argv[1]).read_text())))
    losses = [built.step() for _ in range(CHECKED_STEPS)]
    answer(
        losses=losses,
        settings=built.settings,
        versions=dict(built.versions),
        same_weights=built.same_weights,
        seconds_to_begin=time.perf_counter() - started,
    )
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            before = time.perf_counter()
            built.step()
            seconds.append(time.perf_counter() - before)
        answer(seconds=seconds, peak_bytes=built.peak_bytes())
