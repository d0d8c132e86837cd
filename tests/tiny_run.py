"""A run small enough to be killed often: three stores, a tokenizer, a held-out file and a recipe."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sealion_jax.data.store.writer import write_store
from sealion_jax.tokenizer import train_tokenizer

TEXT = "air api angin bumi laut pasar nasi ikan kopi teh rumah jalan hujan sawah bukit desa sungai pulau"
WORDS = TEXT.split()

RECIPE = '''
"""A recipe of one block and a remainder, for tests."""

from sealion_jax.checkpoint.orbax import CheckpointConfig
from sealion_jax.data.mixture import MixtureConfig, SourceConfig, StageConfig
from sealion_jax.evaluation.config import EvaluationConfig
from sealion_jax.model.config import ComputeConfig, Gemma3Config
from sealion_jax.optimizer import CosineSchedule, OptimizerConfig
from sealion_jax.recipe import TrainConfig


def recipe() -> TrainConfig:
    return TrainConfig(
        name="tiny",
        tokenizer="{folder}/tokenizer.model",
        model=Gemma3Config(
            vocab_size=600, num_layers=3, layers_per_block=2, model_dim=32, num_heads=4, num_kv_heads=2,
            head_dim=8, feed_forward_dim=64, query_scale_dim=8, sliding_window_tokens=16,
        ),
        compute=ComputeConfig(dtype="float32", remat="none"),
        data=MixtureConfig(
            sources=tuple(
                SourceConfig(name=name, store=f"{folder}/stores/{{name}}", weight=weight)
                for name, weight in (("one", 0.5), ("two", 0.3), ("three", 0.2))
            ),
            stages=(StageConfig(start_step=6, weights={{"one": 0.2, "two": 0.2, "three": 0.6}}),),
        ),
        sequence_length_tokens=32,
        global_batch_size=16,
        steps=12,
        optimizer=OptimizerConfig(
            schedule=CosineSchedule(peak_learning_rate=3e-3, final_learning_rate=3e-4, warmup_steps=2)
        ),
        checkpoints=CheckpointConfig(interval_steps=2, keep_last=3),
        evaluation=EvaluationConfig(
            sets={{"held-out": "{folder}/held_out.jsonl"}}, interval_steps=6, batch_size=8
        ),
    )
'''


@dataclass(frozen=True)
class TinyWorld:
    """What a tiny run needs, in one folder."""

    folder: Path

    @property
    def recipe(self) -> str:
        return str(self.folder / "tiny.py")

    @property
    def held_out(self) -> str:
        return str(self.folder / "held_out.jsonl")


def make_world(folder: Path) -> TinyWorld:
    """Stores of sentences that are half predictable, so that a tiny model learns something."""
    rng = np.random.default_rng(0)

    def text() -> str:
        start = rng.integers(len(WORDS), size=int(rng.integers(4, 40)))
        return " ".join(WORDS[i] if rng.random() < 0.5 else WORDS[(i + 1) % len(WORDS)] for i in start)

    tokenizer = train_tokenizer([text() for _ in range(200)], vocab_size=600, path=folder / "tokenizer.model")
    for name in ("one", "two", "three"):
        write_store(folder / "stores" / name, [(text(), name) for _ in range(150)], tokenizer=tokenizer)
    rows = [{"text": text(), "lang": "id" if n % 2 else "ms", "id": str(n)} for n in range(12)]
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tiny.py").write_text(RECIPE.format(folder=folder))
    return TinyWorld(folder)


def rows_of(run_dir: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses_of(run_dir: Path) -> dict[int, float]:
    """Step -> training loss, every bit of it."""
    return {row["step"]: row["loss"] for row in rows_of(run_dir) if "loss" in row}


def copy_run(source: Path, target: Path, *, newest: int) -> Path:
    """A copy of a run as it was after step `newest`: later checkpoints are left out."""
    shutil.copytree(source, target)
    for step in (target / "checkpoints").iterdir():
        if int(step.name) > newest:
            shutil.rmtree(step)
    return target


def scalars_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar in a folder of TensorBoard event files, read record by record: (step, value) by tag."""
    from tensorboardX.proto.event_pb2 import Event

    scalars: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            for value in event.summary.value:
                scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
    return scalars
