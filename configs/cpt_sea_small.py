"""Thirteen languages of real text at 20 to 60M parameters: learning that can be seen on a CPU.

The text is a folder with `cpt/<language>.jsonl` and `eval/ntrex_heldout.jsonl`, by default ../shared/data or
what SEALION_SHARED_DATA names. Prepare it once, then train:

    python -m sealion_configs.cpt_sea_small --output data/sea_small
    python -m sealion_jax.train cpt_sea_small

The first is the same as these, and makes the held-out documents of the eleven languages of NTREX besides:

    python -m sealion_jax.prepare TEXTS/cpt/en.jsonl --tokenizer TOKENIZER --output data/sea_small/stores/en
    ...                                                       (and id ms tl vi th ta my km lo zh)
    python -m sealion_jax.prepare TEXTS/cpt/jv.jsonl --tokenizer TOKENIZER --output data/sea_small/stores/jv
        --hold-out-share 0.02 --hold-out-file data/sea_small/heldout/jv.jsonl              (and su)

`--tokenizer` chooses another SentencePiece model than the 16k stand-in; with Gemma 3's 262k one the model is
narrower, so that the embedding stays affordable. SEALION_SEA_SMALL names another folder than data/sea_small.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from sealion_configs._sea_small import copy_tokenizer, parse, prepared
from sealion_jax import cli, prepare
from sealion_jax.checkpoint.orbax import CheckpointConfig
from sealion_jax.data.mixture import MixtureConfig, SourceConfig
from sealion_jax.evaluation.config import EvaluationConfig
from sealion_jax.model.config import ComputeConfig, Gemma3Config
from sealion_jax.optimizer import CosineSchedule, OptimizerConfig
from sealion_jax.recipe import TrainConfig
from sealion_jax.tokenizer import Tokenizer

NTREX_LANGUAGES = ("en", "id", "ms", "tl", "vi", "th", "ta", "my", "km", "lo", "zh")
HASHED_LANGUAGES = ("jv", "su")
HELD_OUT_SHARE = 0.02
STEPS = 300


def model(vocab_size: int) -> Gemma3Config:
    """20M parameters with a vocabulary of 16k, 37M (34M of them embedding) with 262k."""
    narrow = vocab_size > 65_536
    return Gemma3Config(
        vocab_size=vocab_size,
        num_layers=8,
        model_dim=128 if narrow else 320,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32 if narrow else 80,
        feed_forward_dim=1024 if narrow else 1632,
        query_scale_dim=32 if narrow else 80,
        sliding_window_tokens=128,
        max_context_tokens=2048,
    )


def recipe() -> TrainConfig:
    """Every language in equal parts, in float32, from freshly drawn weights."""
    tokenizer = prepared("cpt_sea_small", "tokenizer.model")
    folder = tokenizer.parent
    languages = NTREX_LANGUAGES + HASHED_LANGUAGES
    return TrainConfig(
        name="cpt_sea_small",
        tokenizer=str(tokenizer),
        model=model(Tokenizer.load(str(tokenizer)).vocab_size),
        data=MixtureConfig(
            sources=tuple(
                SourceConfig(name=language, store=str(folder / "stores" / language), weight=1.0)
                for language in languages
            )
        ),
        compute=ComputeConfig(dtype="float32", remat="none"),
        sequence_length_tokens=512,
        global_batch_size=4,
        steps=STEPS,
        optimizer=OptimizerConfig(
            schedule=CosineSchedule(
                peak_learning_rate=2e-3, final_learning_rate=2e-4, warmup_steps=STEPS // 10
            ),
        ),
        checkpoints=CheckpointConfig(interval_steps=STEPS // 4),
        evaluation=EvaluationConfig(
            sets={language: str(folder / "heldout" / f"{language}.jsonl") for language in languages},
            batch_size=8,
        ),
    )


def main(argv: Sequence[str]) -> None:
    """Prepares the data of this recipe; what is finished is left as it is."""
    options = parse(argv, recipe="cpt_sea_small", description=main.__doc__)
    texts, output = options.folder("cpt"), options.output_folder
    (output / "heldout").mkdir(parents=True, exist_ok=True)
    for language in NTREX_LANGUAGES + HASHED_LANGUAGES:
        words = [str(texts / f"{language}.jsonl"), "--output", str(output / "stores" / language)]
        words += ["--tokenizer", options.tokenizer_path]
        if language in HASHED_LANGUAGES:
            held_out = output / "heldout" / f"{language}.jsonl"
            words += ["--hold-out-share", str(HELD_OUT_SHARE), "--hold-out-file", str(held_out)]
            words += ["--hold-out-seed", str(options.hold_out_seed)]
        prepare.main(words)
    write_ntrex_documents(options.folder("eval") / "ntrex_heldout.jsonl", output / "heldout")
    # Last: the recipe takes it as the sign that all is there.
    copy_tokenizer(options)
    print(f"prepared {output}; next: python -m sealion_jax.train cpt_sea_small")


def write_ntrex_documents(lines_file: Path, folder: Path) -> None:
    """Writes `<folder>/<language>.jsonl`, the held-out lines of each document joined again."""
    rows = [json.loads(line) for line in lines_file.read_text(encoding="utf-8").splitlines()]
    for language in NTREX_LANGUAGES:
        documents: dict[str, list[str]] = {}
        for row in sorted(rows, key=lambda row: row["line"]):
            documents.setdefault(row["doc"], []).append(row[language])
        text = "".join(
            json.dumps({"text": "\n".join(lines), "lang": language, "id": name}, ensure_ascii=False) + "\n"
            for name, lines in documents.items()
        )
        (folder / f"{language}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    cli.run(main)
