"""What a model in training writes after a few fixed prompts, now and then, for people to read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath
from jax.sharding import Mesh

from sealion_jax.generation.config import SamplesConfig
from sealion_jax.generation.generator import Generator
from sealion_jax.generation.prompts import Asking, text_prompt_ids
from sealion_jax.metrics import fresh_tensorboard, read_rows
from sealion_jax.model.config import Gemma3Config
from sealion_jax.model.gemma3 import Gemma3, Params
from sealion_jax.tokenizer import Tokenizer

SAMPLES_FILE = "samples.jsonl"

Sample = tuple[str, str]
"""A prompt, and what the model wrote after it."""


class Sampler:
    """Draws samples from the model in training; compiled once and used every time."""

    def __init__(
        self,
        bind: Callable[[Params], Gemma3],
        mesh: Mesh,
        *,
        model: Gemma3Config,
        tokenizer: Tokenizer,
        config: SamplesConfig,
    ) -> None:
        asking = Asking(format=config.format)
        self._prompts = config.prompts
        self._ids = [text_prompt_ids(prompt, tokenizer, asking) for prompt in config.prompts]
        self._max_new_tokens = config.max_new_tokens
        self._tokenizer = tokenizer
        self._generator = Generator(
            bind,
            mesh,
            config=model,
            sampling=config.sampling,
            stop_ids=tokenizer.stop_ids,
            batch_size=len(config.prompts),
        )

    def __call__(self, params: Params) -> list[Sample]:
        """Each prompt with what these parameters write after it; all processes call this together."""
        completions = self._generator.generate(params, self._ids, max_new_tokens=self._max_new_tokens)
        texts = [self._tokenizer.decode(completion.text_ids) for completion in completions]
        return list(zip(self._prompts, texts, strict=True))


class SamplesLog:
    """`<run>/samples.jsonl`, an object a sample, and the same as text in `<run>/tensorboard/samples/`.

    Opened for a run that goes on after step N, it drops every sample after N, and lines that are no samples.
    """

    def __init__(self, run_dir: epath.Path, *, last_step: int) -> None:
        self._path = run_dir / SAMPLES_FILE
        kept = read_rows(self._path, needed={"step": int, "number": int, "prompt": str, "text": str})
        rows = [row for row in kept if row["step"] <= last_step]
        run_dir.mkdir(parents=True, exist_ok=True)
        replacement = run_dir / f"{SAMPLES_FILE}.new"
        self._file = open(replacement, "w", encoding="utf-8")  # noqa: SIM115 (closed by close())
        self._file.writelines(map(_line, rows))
        self._file.flush()
        os.fsync(self._file.fileno())
        replacement.replace(self._path)
        self._writer = fresh_tensorboard(run_dir / "tensorboard" / "samples")
        for row in rows:
            self._mirror(row)
        self._writer.flush()

    def append(self, step: int, samples: Sequence[Sample]) -> None:
        """Writes the samples of a step, for everyone to read."""
        for number, (prompt, text) in enumerate(samples):
            row = {"step": step, "number": number, "prompt": prompt, "text": text}
            self._file.write(_line(row))
            self._mirror(row)
        self._file.flush()
        self._writer.flush()

    def close(self) -> None:
        self._file.close()
        self._writer.close()

    def _mirror(self, row: dict[str, Any]) -> None:
        from tensorboardX.summary import text

        # TensorBoard shows Markdown: four spaces keep a text as it is.
        shown = "\n".join(f"    {line}" for line in f"{row['prompt']}\n\n{row['text']}".split("\n"))
        self._writer.add_summary(text(f"samples/{row['number']}", shown), row["step"])


class ShowSamples:
    """Training hook: samples before the first step, now and then, and after the last."""

    def __init__(
        self,
        draw: Callable[[Params], list[Sample]],
        write: Callable[[int, Sequence[Sample]], None],
        *,
        interval_steps: int,
        last_step: int,
    ) -> None:
        """
        Args:
            write: what becomes of a step's samples: `SamplesLog.append` in one process, nothing in others.
        """
        self._draw = draw
        self._write = write
        self._interval = interval_steps
        self._last_step = last_step

    def needs_state(self, step: int) -> bool:
        return step in (0, self._last_step) or (self._interval > 0 and step % self._interval == 0)

    def __call__(self, run: Any, row: dict[str, Any]) -> None:
        if self.needs_state(row["step"]):
            self._write(row["step"], self._draw(run.state.weights))


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
