"""Samples of a model in training: what is drawn, when, and what is written of it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from sealion_jax.errors import UserError
from sealion_jax.generation.config import SamplesConfig, SamplingConfig
from sealion_jax.generation.prompts import Asking, text_prompt_ids
from sealion_jax.generation.samples import Sampler, SamplesLog, ShowSamples
from sealion_jax.model.config import ComputeConfig, Gemma3Config
from sealion_jax.model.gemma3 import abstract_params, binder
from sealion_jax.sharding import MeshConfig, make_mesh
from sealion_jax.tokenizer import train_tokenizer

TEXT = "user model once upon a time there was a king, and he had a daughter."
PROMPTS = ("once upon", "there was a king,")


def test_samples_are_the_likeliest_answers(tmp_path: Path) -> None:
    """Against the forward pass without a cache; they follow the parameters that are given."""
    tokenizer = train_tokenizer([TEXT], vocab_size=550, path=tmp_path / "tokenizer.model")
    model = Gemma3Config(
        vocab_size=560,
        num_layers=1,
        model_dim=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        feed_forward_dim=16,
        sliding_window_tokens=4,
        max_context_tokens=64,
    )
    bind = binder(model, compute=ComputeConfig(dtype="float32"))
    config = SamplesConfig(prompts=PROMPTS, max_new_tokens=3, format="chat")
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    sampler = Sampler(bind, mesh, model=model, tokenizer=tokenizer, config=config)

    @jax.jit
    def logits_of(params: Any, tokens: jax.Array) -> jax.Array:
        ones, positions = jnp.ones_like(tokens), jnp.arange(tokens.shape[1])[None]
        bound = bind(params)
        return bound.logits(bound(tokens, positions=positions, segment_ids=ones))

    drawn = []
    for seed in (0, 1):
        rng = np.random.default_rng(seed)
        params = jax.tree.map(
            lambda leaf, rng=rng: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), abstract_params(model)
        )
        expected = []
        for prompt in PROMPTS:
            ids = text_prompt_ids(prompt, tokenizer, Asking(format="chat"))
            row = np.zeros((1, 40), np.int32)
            row[0, : len(ids)] = ids
            for n in range(len(ids), len(ids) + 3):
                row[0, n] = np.asarray(logits_of(params, row))[0, n - 1].argmax()
            assert not {tokenizer.eos_id, tokenizer.end_of_turn_id} & set(row[0, len(ids) :].tolist())
            expected.append((prompt, tokenizer.decode(row[0, len(ids) : len(ids) + 3])))
        assert sampler(params) == expected
        drawn.append(expected)
    assert drawn[0] != drawn[1]


def test_samples_are_drawn_at_the_ends_and_now_and_then() -> None:
    written: list[tuple[int, Any]] = []
    hook = ShowSamples(
        lambda params: [("once", params)],
        lambda step, samples: written.append((step, samples)),
        interval_steps=4,
        last_step=10,
    )
    assert [step for step in range(11) if hook.needs_state(step)] == [0, 4, 8, 10]
    for step in range(11):
        run = SimpleNamespace(state=SimpleNamespace(weights=f"weights of step {step}"))
        hook(run, {"step": step})
    assert written == [(step, [("once", f"weights of step {step}")]) for step in (0, 4, 8, 10)]
    rarely = ShowSamples(lambda params: [], lambda *_: None, interval_steps=0, last_step=10)
    assert [step for step in range(11) if rarely.needs_state(step)] == [0, 10]


def rows_of(run_dir: Path) -> list[tuple[int, int, str]]:
    rows = map(json.loads, (run_dir / "samples.jsonl").read_text().split("\n")[:-1])
    return [(row["step"], row["number"], row["text"]) for row in rows]


def texts_of(folder: Path) -> list[tuple[int, str, str]]:
    """Step, tag and text of every event in TensorBoard's files, read record by record."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            for value in event.summary.value:
                found.append((event.step, value.tag, value.tensor.string_val[0].decode()))
    return found


def test_a_run_that_goes_on_writes_no_sample_twice(tmp_path: Path) -> None:
    log = SamplesLog(epath.Path(tmp_path), last_step=0)
    for step in (0, 4, 8):
        log.append(step, [("once", f"upon {step}"), ("there", "ខ្មែរ\nand\u2028more")])
    log.close()
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"step": 5, "number": 0, "prompt": "once", "texT": "damaged"}\n{"step": 9, "num')
    log = SamplesLog(epath.Path(tmp_path), last_step=6)
    log.append(8, [("once", "again")])
    log.close()
    expected = [
        (step, n, text) for step in (0, 4) for n, text in enumerate((f"upon {step}", "ខ្មែរ\nand\u2028more"))
    ]
    assert rows_of(tmp_path) == [*expected, (8, 0, "again")]
    shown = texts_of(tmp_path / "tensorboard" / "samples")
    assert [step for step, *_ in shown] == [0, 0, 4, 4, 8]
    assert shown[0][2] == "    once\n    \n    upon 0"
    assert shown[1][1].startswith("samples/1") and "    ខ្មែរ\n    and" in shown[1][2]


def test_what_makes_no_sense_is_refused() -> None:
    for options, words in (
        ({"interval_steps": -1}, "samples.interval_steps must be at least 0"),
        ({"max_new_tokens": 0}, "samples.max_new_tokens must be at least 1"),
        ({"format": "poem"}, "samples.format must be chat or raw, not 'poem'"),
        ({"format": "chat", "prompts": ("Hi", " ")}, r"samples.prompts\[1\] is blank"),
    ):
        with pytest.raises(UserError, match=words):
            SamplesConfig(**options)
    assert SamplesConfig(prompts=("",)).sampling == SamplingConfig()
