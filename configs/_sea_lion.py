"""SEA-LION's mixture and training settings as data, for the recipes of its three stages on Gemma 3.

Sources: the model cards of SEA-LION v4 and v3 in the repository aisingapore/sealion. Where a card gives no
number, the choice is ours and says so.
"""

from __future__ import annotations

import os
from typing import Any

from sealion_jax.checkpoint.orbax import CheckpointConfig
from sealion_jax.data.mixture import MixtureConfig, SourceConfig
from sealion_jax.model.config import ComputeConfig, Gemma3Config
from sealion_jax.objectives.preference_config import APOZeroLoss, PreferenceConfig
from sealion_jax.optimizer import CosineSchedule, OptimizerConfig, WarmupStableDecay
from sealion_jax.recipe import TrainConfig
from sealion_jax.sharding import MeshConfig
from sealion_jax.training.config import LoggingConfig

BUCKET_VARIABLE = "SEALION_BUCKET"

SEQUENCE_LENGTH_TOKENS = 8192
GLOBAL_BATCH_SIZE = 1024
ROWS_PER_DEVICE = 4
"""Beside the 27B's state on 64 v5p chips they fit; on more devices a batch takes fewer microbatches."""
TRAINING_TOKENS = 500_000_000_000

POST_TRAINING_BATCH_SIZE = 128
"""Rows of a step in both later stages: a million tokens. Ours."""
CHAT_LANGUAGES = ("en", "zh", "vi", "id", "th", "tl", "ta", "ms", "my", "km")
"""The card says ten languages; which ten is our choice."""

V4_PERCENT_OF_TOKENS = {
    "code_starcoder": 10,
    "en_fineweb_edu": 16,
    "en_dclm_hq": 16,
    "en_other": 8,
    "zh": 9,
    "vi": 8.5,
    "id": 8.5,
    "th": 8.5,
    # The card gives these six 15.5 together; how that is shared among them is our choice.
    "tl": 2.75,
    "ta": 2.75,
    "ms": 2.75,
    "km": 2.75,
    "my": 2.75,
    "lo": 1.75,
}
"""SEA-LION v4's continued pre-training: name of the source -> percent of the tokens; 100 in all."""


def bucket() -> str:
    """The folder that holds `stores/<source>` and the Hugging Face checkpoints: SEALION_BUCKET, local or gs://.

    Unset, its name stands in the paths, so that a missing store's message tells what to set.
    """
    return os.environ.get(BUCKET_VARIABLE, f"${BUCKET_VARIABLE}").rstrip("/")


def sea_lion_v4_mixture(folder: str, *, seed: int = 0) -> MixtureConfig:
    """SEA-LION v4's mixture over the token stores `<folder>/stores/<source>`, shares by weight."""
    return MixtureConfig(
        sources=tuple(
            SourceConfig(name=name, store=f"{folder}/stores/{name}", weight=percent)
            for name, percent in V4_PERCENT_OF_TOKENS.items()
        ),
        seed=seed,
    )


def total_steps(tokens: int = TRAINING_TOKENS) -> int:
    """Steps that the tokens take: 59,605 for 500B in 1024 rows of 8192."""
    return round(tokens / (SEQUENCE_LENGTH_TOKENS * GLOBAL_BATCH_SIZE))


def v4_schedule(steps: int) -> CosineSchedule:
    """Cosine, as v4's card says; it gives 4e-8, which we read as the final rate.

    The peak is v3's 1e-5 and the warm-up v3's tenth: v4's are not published.
    """
    return CosineSchedule(peak_learning_rate=1e-5, final_learning_rate=4e-8, warmup_steps=steps // 10)


def v3_schedule(steps: int) -> WarmupStableDecay:
    """Warmup-stable-decay, as v3's card has it: 1e-5, a tenth of the steps up, a tenth down, to 1e-7."""
    return WarmupStableDecay(
        peak_learning_rate=1e-5,
        final_learning_rate=1e-7,
        warmup_steps=steps // 10,
        decay_steps=steps // 10,
    )


def continued_pretraining(
    name: str, *, model: Gemma3Config, checkpoint: str, mesh: MeshConfig
) -> TrainConfig:
    """SEA-LION v4's continued pre-training for one size of Gemma 3.

    Published: the mixture, 8k tokens, 1024 rows, 500B tokens, bfloat16, AdamW with decoupled decay, cosine.
    Ours: the mesh, rows per device, betas, decay, clipping, and how often state is saved.

    Args:
        checkpoint: folder in the bucket with the Hugging Face checkpoint to start from, tokenizer included.
        mesh: devices along each axis; 1024 rows must divide over data x fsdp.
    """
    folder = bucket()
    start = f"{folder}/{checkpoint}"
    steps = total_steps()
    return TrainConfig(
        name=name,
        tokenizer=start,
        init_from=start,
        model=model,
        data=sea_lion_v4_mixture(folder),
        # Logits of some 1,280 tokens at a time: from 1,024 on, their gradient is taken along with them. Ours.
        compute=ComputeConfig(dtype="bfloat16", remat="block", logits_bytes_per_device=1280 * 2**20),
        sequence_length_tokens=SEQUENCE_LENGTH_TOKENS,
        global_batch_size=GLOBAL_BATCH_SIZE,
        rows_per_device=ROWS_PER_DEVICE,
        steps=steps,
        optimizer=OptimizerConfig(schedule=v4_schedule(steps)),
        mesh=mesh,
        checkpoints=CheckpointConfig(interval_steps=500, keep_last=3, keep_every_steps=5000),
        logging=LoggingConfig(interval_steps=10),
    )


def instruction_tuning(
    name: str, *, model: Gemma3Config, checkpoint: str, after: str, mesh: MeshConfig
) -> TrainConfig:
    """Instruction tuning of the continued model for one size of Gemma 3, on chats in ten languages.

    Published: about 10M question-answer pairs in ten languages. Ours: everything else. 7,000 steps of a
    million tokens are one pass over 10M chats of 700 tokens.

    Args:
        checkpoint: folder in the bucket with the original model, for its tokenizer.
        after: run directory in the bucket of the stage before; `--init-from` names another CHECKPOINT.
    """
    return _post_training(
        name=name,
        tokenizer=f"{bucket()}/{checkpoint}",
        init_from=f"{bucket()}/runs/{after}",
        model=model,
        data=_in_ten_languages("chats"),
        steps=7000,
        schedule=CosineSchedule(peak_learning_rate=1e-5, final_learning_rate=1e-6, warmup_steps=350),
        mesh=mesh,
        checkpoints=CheckpointConfig(interval_steps=500, keep_last=3),
    )


def preference_optimisation(
    name: str, *, model: Gemma3Config, checkpoint: str, after: str, mesh: MeshConfig
) -> TrainConfig:
    """Alignment of the tuned model for one size of Gemma 3, on pairs of answers.

    Published: APO, on pairs whose rejected answers the model itself wrote and whose chosen ones are rewrites
    of them. That is the setting in which APO-zero is recommended (arXiv:2408.06266): the chosen answers are
    better than what the model writes. Ours: everything else.

    Args:
        checkpoint: folder in the bucket with the original model, for its tokenizer.
        after: run directory in the bucket of the stage before; `--init-from` names another CHECKPOINT.
    """
    return _post_training(
        name=name,
        tokenizer=f"{bucket()}/{checkpoint}",
        init_from=f"{bucket()}/runs/{after}",
        model=model,
        data=_in_ten_languages("pairs"),
        objective=PreferenceConfig(losses=(APOZeroLoss(beta=0.1),)),
        steps=1000,
        schedule=CosineSchedule(peak_learning_rate=5e-7, final_learning_rate=5e-8, warmup_steps=100),
        mesh=mesh,
        checkpoints=CheckpointConfig(interval_steps=200, keep_last=3),
    )


def _in_ten_languages(kind: str) -> MixtureConfig:
    """Each language's chats or pairs, each row once in an epoch."""
    return MixtureConfig(
        sources=tuple(
            SourceConfig(name=language, store=f"{bucket()}/{kind}/{language}", multiplier=1.0)
            for language in CHAT_LANGUAGES
        )
    )


def _post_training(*, schedule: CosineSchedule, **fields: Any) -> TrainConfig:
    """A later stage: its own fields, beside the rows and the precision that both have."""
    return TrainConfig(
        compute=ComputeConfig(dtype="bfloat16", remat="block"),
        sequence_length_tokens=SEQUENCE_LENGTH_TOKENS,
        global_batch_size=POST_TRAINING_BATCH_SIZE,
        optimizer=OptimizerConfig(schedule=schedule),
        logging=LoggingConfig(interval_steps=10),
        **fields,
    )
