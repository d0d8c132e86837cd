"""Chats, pairs and recipes to fine-tune a tiny model with, next to the world of `tiny_run`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from sealion_jax.data.chat.rows import chat_from_fields, preference_from_fields
from sealion_jax.data.store.writer import write_chat_store
from sealion_jax.tokenizer import Tokenizer
from tests.tiny_run import WORDS

RECIPE = '''
"""Fine-tuning on chats, and on pairs, of one block and a remainder, for tests."""

import dataclasses

from sealion_jax.data.mixture import MixtureConfig, SourceConfig
from sealion_jax.data.packing.examples import ExamplesConfig
from sealion_jax.evaluation.config import EvaluationConfig
from sealion_jax.objectives.preference_config import PreferenceConfig, SFTLoss, SigmoidLoss
from sealion_jax.recipe import TrainConfig, load_recipe


def recipe() -> TrainConfig:
    base = load_recipe("{folder}/tiny.py")
    return dataclasses.replace(
        base,
        name="{kind}",
        data=MixtureConfig(
            sources=(
                SourceConfig(name="one", store="{folder}/{kind}/one", weight=0.7),
                SourceConfig(name="two", store="{folder}/{kind}/two", weight=0.3),
            ),
            examples=ExamplesConfig(too_long="truncate_left"),
        ),
        objective={objective},
        sequence_length_tokens=64,
        global_batch_size=8,
        steps=8,
        evaluation=EvaluationConfig(sets={{"held-out": "{folder}/{kind}.jsonl"}}, batch_size=8),
    )
'''
OBJECTIVES = {
    "chats": "base.objective",
    "pairs": "PreferenceConfig(losses=(SigmoidLoss(beta=0.2), SFTLoss(weight=0.1)))",
}


def sentence(rng: np.random.Generator, most: int = 7) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(1, most)))


def chat_row(rng: np.random.Generator) -> dict:
    messages = []
    for _ in range(rng.integers(1, 3)):
        question = sentence(rng)
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": f"{question} {question.split()[0]}"},
        ]
    return {"messages": messages, "lang": str(rng.choice(["id", "ms"]))}


def pair_row(rng: np.random.Generator) -> dict:
    question = sentence(rng)
    return {
        "prompt": question,
        "chosen": f"{question} nasi",
        "rejected": f"{sentence(rng)} kopi kopi",
        "lang": str(rng.choice(["id", "ms"])),
    }


def add_chats(folder: Path) -> dict[str, str]:
    """Kind -> recipe of stores of chats and of pairs, made in the folder of a `TinyWorld`."""
    rng = np.random.default_rng(3)
    tokenizer = Tokenizer.load(str(folder / "tokenizer.model"))
    recipes = {}
    for kind, draw, read in (
        ("chats", chat_row, chat_from_fields),
        ("pairs", pair_row, preference_from_fields),
    ):
        for name in ("one", "two"):
            rows = [draw(rng) for _ in range(60)]
            write_chat_store(
                folder / kind / name, [(read(row), row["lang"]) for row in rows], tokenizer=tokenizer
            )
        held_out = [draw(rng) for _ in range(10)]
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
        (folder / f"{kind}.py").write_text(
            RECIPE.format(folder=folder, kind=kind, objective=OBJECTIVES[kind])
        )
        recipes[kind] = str(folder / f"{kind}.py")
    return recipes
