"""The second embedded recipe: instruction tuning of cpt_tiny's model on the chats in the package.

About a minute on two CPU cores. It goes on from runs/cpt_tiny, in the folder it is started in.
"""

from __future__ import annotations

from sealion_configs._embedded import BATCH_SIZE, evaluation, sources
from sealion_jax.checkpoint.orbax import CheckpointConfig
from sealion_jax.data.mixture import MixtureConfig
from sealion_jax.embedded import embedded
from sealion_jax.model.config import ComputeConfig
from sealion_jax.optimizer import CosineSchedule, OptimizerConfig
from sealion_jax.recipe import TrainConfig

STEPS = 45


def recipe() -> TrainConfig:
    """Thirteen languages in equal parts, in float32; learned is what the assistant says."""
    corpus = embedded()
    return TrainConfig(
        name="sft_tiny",
        init_from="runs/cpt_tiny",
        tokenizer=str(corpus.tokenizer),
        data=MixtureConfig(sources=sources(corpus.chats)),
        compute=ComputeConfig(dtype="float32", remat="none"),
        sequence_length_tokens=384,  # the longest chat: declarations of tools take room
        global_batch_size=BATCH_SIZE,
        steps=STEPS,
        optimizer=OptimizerConfig(
            schedule=CosineSchedule(
                peak_learning_rate=1e-3, final_learning_rate=1e-4, warmup_steps=STEPS // 10
            ),
        ),
        checkpoints=CheckpointConfig(interval_steps=STEPS // 2),
        evaluation=evaluation("chats", corpus.chats),
    )
