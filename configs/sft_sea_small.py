"""Instruction tuning on real chats: translation, sentiment and tool calls, after `cpt_sea_small`.

The chats are `sft/*.jsonl` of the folder that `cpt_sea_small` reads. Prepare them once, then train:

    python -m sealion_configs.sft_sea_small --output data/sea_small
    python -m sealion_jax.train sft_sea_small

The first is the same as these, and puts the rows held out together in data/sea_small/heldout/chats.jsonl:

    python -m sealion_jax.prepare TEXTS/sft/sentiment_nusax.jsonl --kind chats --tokenizer TOKENIZER
        --output data/sea_small/chats/sentiment_nusax
        --hold-out-share 0.1 --hold-out-file data/sea_small/heldout/chats/sentiment_nusax.jsonl
    ...                                                       (and the three others)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sealion_configs._sea_small import concatenate, copy_tokenizer, parse, prepared
from sealion_jax import cli, prepare
from sealion_jax.checkpoint.orbax import CheckpointConfig
from sealion_jax.data.mixture import MixtureConfig, SourceConfig
from sealion_jax.data.packing.examples import ExamplesConfig
from sealion_jax.evaluation.config import EvaluationConfig
from sealion_jax.generation.config import SamplesConfig
from sealion_jax.model.config import ComputeConfig
from sealion_jax.optimizer import CosineSchedule, OptimizerConfig
from sealion_jax.recipe import TrainConfig

SHARES = {
    "translation_tatoeba": 0.6,
    "translation_nusax": 0.15,
    "sentiment_nusax": 0.1,
    "toolcall_glaive_en": 0.15,
}
HELD_OUT_SHARE = 0.1
STEPS = 150


def recipe() -> TrainConfig:
    """Four tasks in ten languages, in float32, from the run of cpt_sea_small."""
    return on(prepared("sft_sea_small", "heldout/chats.jsonl").parents[1])


def on(folder: Path) -> TrainConfig:
    """The recipe on what `main` put into a folder."""
    return TrainConfig(
        name="sft_sea_small",
        init_from="runs/cpt_sea_small",
        tokenizer=str(folder / "tokenizer.model"),
        data=MixtureConfig(
            sources=tuple(
                SourceConfig(name=name, store=str(folder / "chats" / name), weight=weight)
                for name, weight in SHARES.items()
            ),
            examples=ExamplesConfig(too_long="truncate_left"),
        ),
        compute=ComputeConfig(dtype="float32", remat="none"),
        sequence_length_tokens=512,
        global_batch_size=4,
        steps=STEPS,
        optimizer=OptimizerConfig(
            schedule=CosineSchedule(
                peak_learning_rate=1e-3, final_learning_rate=1e-4, warmup_steps=STEPS // 10
            ),
        ),
        checkpoints=CheckpointConfig(interval_steps=STEPS // 3),
        evaluation=EvaluationConfig(sets={"chats": str(folder / "heldout" / "chats.jsonl")}, batch_size=8),
        samples=SamplesConfig(
            prompts=("Terjemahkan teks berikut ke dalam bahasa Indonesia:\n\nThe cat is sleeping.",),
            format="chat",
            max_new_tokens=32,
        ),
    )


def main(argv: Sequence[str]) -> None:
    """Prepares the data of this recipe; what is finished is left as it is."""
    options = parse(argv, recipe="sft_sea_small", description=main.__doc__)
    output = options.output_folder
    held_out = output / "heldout" / "chats"
    held_out.mkdir(parents=True, exist_ok=True)
    for name in SHARES:
        prepare.main(
            [
                str(options.folder("sft") / f"{name}.jsonl"),
                *("--kind", "chats", "--tokenizer", options.tokenizer_path),
                *("--output", str(output / "chats" / name)),
                *("--hold-out-share", str(HELD_OUT_SHARE), "--hold-out-seed", str(options.hold_out_seed)),
                *("--hold-out-file", str(held_out / f"{name}.jsonl")),
            ]
        )
    copy_tokenizer(options)
    # Last: the recipe takes it as the sign that all is there.
    concatenate([held_out / f"{name}.jsonl" for name in SHARES], output / "heldout" / "chats.jsonl")
    print(f"prepared {output}; next: python -m sealion_jax.train sft_sea_small")


if __name__ == "__main__":
    cli.run(main)
