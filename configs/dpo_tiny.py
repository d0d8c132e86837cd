"""The third embedded recipe: preference optimisation of sft_tiny's model on the pairs in the package.

About half a minute on two CPU cores. It goes on from runs/sft_tiny, in the folder it is started in.
"""

from __future__ import annotations

from sealion_configs._embedded import BATCH_SIZE, SEQUENCE_LENGTH_TOKENS, evaluation, sources
from sealion_jax.checkpoint.orbax import CheckpointConfig
from sealion_jax.data.mixture import MixtureConfig
from sealion_jax.embedded import embedded
from sealion_jax.model.config import ComputeConfig
from sealion_jax.objectives.preference_config import PreferenceConfig, SigmoidLoss
from sealion_jax.optimizer import CosineSchedule, OptimizerConfig
from sealion_jax.recipe import TrainConfig

STEPS = 24


def recipe() -> TrainConfig:
    """Thirteen languages in equal parts, in float32; DPO against the model that it starts from."""
    corpus = embedded()
    return TrainConfig(
        name="dpo_tiny",
        init_from="runs/sft_tiny",
        tokenizer=str(corpus.tokenizer),
        data=MixtureConfig(sources=sources(corpus.pairs)),
        objective=PreferenceConfig(losses=(SigmoidLoss(beta=0.1),)),
        compute=ComputeConfig(dtype="float32", remat="none"),
        sequence_length_tokens=SEQUENCE_LENGTH_TOKENS,
        global_batch_size=BATCH_SIZE,
        steps=STEPS,
        optimizer=OptimizerConfig(
            schedule=CosineSchedule(
                peak_learning_rate=1e-4, final_learning_rate=1e-5, warmup_steps=STEPS // 10
            ),
        ),
        checkpoints=CheckpointConfig(interval_steps=STEPS // 2),
        evaluation=evaluation("pairs", corpus.pairs),
    )
