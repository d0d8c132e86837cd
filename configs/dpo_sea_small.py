"""Preference optimisation on real pairs, after `sft_sea_small`: people's and models' choices, and languages.

The pairs are `dpo/*.jsonl` of the folder that `cpt_sea_small` reads, and `wrong_language`, made here of the
translations in `sft/`: the answer, and as the rejected one the text that was to be translated, or another
row's answer in another language. Prepare them once, then train:

    python -m sealion_configs.dpo_sea_small --output data/sea_small
    python -m sealion_jax.train dpo_sea_small

The first is the same as these, once for each source, and puts the rows held out together in
data/sea_small/heldout/pairs.jsonl and wrong_language.jsonl (of the latter only those that share no text with
a pair that is trained on):

    python -m sealion_jax.prepare TEXTS/dpo/xcopa_val_pairs_*.jsonl --kind pairs --tokenizer TOKENIZER
        --output data/sea_small/pairs/xcopa
        --hold-out-share 0.2 --hold-out-file data/sea_small/heldout/pairs/xcopa.jsonl
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sealion_configs._sea_small import concatenate, copy_tokenizer, parse, prepared
from sealion_jax import cli, prepare
from sealion_jax.checkpoint.orbax import CheckpointConfig
from sealion_jax.data.mixture import MixtureConfig, SourceConfig
from sealion_jax.data.packing.examples import ExamplesConfig
from sealion_jax.evaluation.config import EvaluationConfig
from sealion_jax.model.config import ComputeConfig
from sealion_jax.objectives.preference_config import PreferenceConfig, SigmoidLoss
from sealion_jax.optimizer import CosineSchedule, OptimizerConfig
from sealion_jax.recipe import TrainConfig

FILES = {
    "xcopa": "xcopa_val_pairs_*.jsonl",
    "cendol": "cendol_human_rated_mt_jv.jsonl",
    "demo_en": "dpo_en_demo.jsonl",
    "demo_zh": "dpo_zh_demo.jsonl",
}
WRONG_LANGUAGE = "wrong_language"
SHARES = {"xcopa": 0.2, "cendol": 0.1, "demo_en": 0.2, "demo_zh": 0.2, WRONG_LANGUAGE: 0.3}
HELD_OUT_SHARE = 0.2
STEPS = 60


def recipe() -> TrainConfig:
    """DPO in float32 against the run of sft_sea_small, from which it starts."""
    return on(prepared("dpo_sea_small", "heldout/wrong_language.jsonl").parents[1])


def on(folder: Path) -> TrainConfig:
    """The recipe on what `main` put into a folder."""
    heldout = folder / "heldout"
    return TrainConfig(
        name="dpo_sea_small",
        init_from="runs/sft_sea_small",
        tokenizer=str(folder / "tokenizer.model"),
        data=MixtureConfig(
            sources=tuple(
                SourceConfig(name=name, store=str(folder / "pairs" / name), weight=weight)
                for name, weight in SHARES.items()
            ),
            examples=ExamplesConfig(too_long="truncate_left"),
        ),
        objective=PreferenceConfig(losses=(SigmoidLoss(beta=0.1),)),
        compute=ComputeConfig(dtype="float32", remat="none"),
        sequence_length_tokens=1024,
        global_batch_size=4,
        steps=STEPS,
        optimizer=OptimizerConfig(
            schedule=CosineSchedule(
                peak_learning_rate=2e-4, final_learning_rate=2e-5, warmup_steps=STEPS // 10
            ),
        ),
        checkpoints=CheckpointConfig(interval_steps=STEPS // 2),
        evaluation=EvaluationConfig(
            sets={
                "pairs": str(heldout / "pairs.jsonl"),
                WRONG_LANGUAGE: str(heldout / "wrong_language.jsonl"),
            },
            batch_size=8,
        ),
    )


def main(argv: Sequence[str]) -> None:
    """Prepares the data of this recipe; what is finished is left as it is."""
    options = parse(argv, recipe="dpo_sea_small", description=main.__doc__)
    output = options.output_folder
    held_out = output / "heldout" / "pairs"
    held_out.mkdir(parents=True, exist_ok=True)
    made = output / f"{WRONG_LANGUAGE}.jsonl"
    write_wrong_language(options.folder("sft") / "translation_tatoeba.jsonl", made)
    inputs = {name: str(options.folder("dpo") / file) for name, file in FILES.items()}
    for name, file in {**inputs, WRONG_LANGUAGE: str(made)}.items():
        prepare.main(
            [
                file,
                *("--kind", "pairs", "--tokenizer", options.tokenizer_path),
                *("--output", str(output / "pairs" / name)),
                *("--hold-out-share", str(HELD_OUT_SHARE), "--hold-out-seed", str(options.hold_out_seed)),
                *("--hold-out-file", str(held_out / f"{name}.jsonl")),
            ]
        )
    concatenate([held_out / f"{name}.jsonl" for name in FILES], output / "heldout" / "pairs.jsonl")
    copy_tokenizer(options)
    # Last: the recipe takes it as the sign that all is there.
    write_unseen(held_out / f"{WRONG_LANGUAGE}.jsonl", made, output / "heldout" / f"{WRONG_LANGUAGE}.jsonl")
    print(f"prepared {output}; next: python -m sealion_jax.train dpo_sea_small")


def write_unseen(held_out: Path, every: Path, file: Path) -> None:
    """Writes those of the held-out pairs that share no text with a pair that is trained on.

    A sentence is often to be translated into several languages, and an answer often rejected elsewhere.
    """
    candidates, rows = (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in (held_out, every)
    )
    apart = {texts(pair) for pair in candidates}
    trained = {text for pair in rows if texts(pair) not in apart for text in texts(pair)}
    unseen = [pair for pair in candidates if trained.isdisjoint(texts(pair))]
    file.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in unseen), encoding="utf-8")


def texts(pair: Mapping[str, Any]) -> tuple[str, str, str]:
    """What a pair asks to be translated, its chosen and its rejected answer."""
    question, chosen, rejected = (pair[name][0]["content"] for name in ("prompt", "chosen", "rejected"))
    return question.partition("\n\n")[2], chosen, rejected


def write_wrong_language(translations: Path, file: Path) -> None:
    """Writes a pair for each translation out of English: rejected is the English text, or, as often, another
    row's answer in another language."""
    rows = [json.loads(line) for line in translations.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["direction"].startswith("en-")]
    by_language: dict[str, list[str]] = {}
    for row in rows:
        by_language.setdefault(row["lang"], []).append(row["messages"][1]["content"])
    chance = random.Random(0)
    with open(file, "w", encoding="utf-8") as out:
        for row in rows:
            question, answer = row["messages"]
            rejected = question["content"].partition("\n\n")[2]
            if chance.random() < 0.5:
                other = chance.choice([language for language in by_language if language != row["lang"]])
                rejected = chance.choice(by_language[other])
            pair = {
                "prompt": [question],
                "chosen": [answer],
                "rejected": [{"role": "assistant", "content": rejected}],
                "lang": row["lang"],
                "source": row["source"],
            }
            out.write(json.dumps(pair, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    cli.run(main)
