"""Instruction tuning of continued Gemma 3 1B.

    export SEALION_BUCKET=gs://BUCKET      # holds chats/<language>, runs/cpt_1b and gemma-3-1b-it
    python -m sealion_jax.train sft_1b --run-dir /shared/runs/sft_1b

Weights and optimizer state take 12 GB in float32, split over four devices.
"""

from __future__ import annotations

from sealion_configs._sea_lion import instruction_tuning
from sealion_jax.model.config import gemma3_1b
from sealion_jax.recipe import TrainConfig
from sealion_jax.sharding import MeshConfig


def recipe() -> TrainConfig:
    """The stage after `cpt_1b`; `_sea_lion.py` says which settings are published and which are ours."""
    return instruction_tuning(
        "sft_1b",
        model=gemma3_1b(),
        checkpoint="gemma-3-1b-it",
        after="cpt_1b",
        mesh=MeshConfig(data=-1, fsdp=4),
    )
