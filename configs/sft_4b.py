"""Instruction tuning of continued Gemma 3 4B.

    export SEALION_BUCKET=gs://BUCKET      # holds chats/<language>, runs/cpt_4b and gemma-3-4b-it
    python -m sealion_jax.train sft_4b --run-dir /shared/runs/sft_4b

Weights and optimizer state take 47 GB in float32, split over eight devices.
"""

from __future__ import annotations

from sealion_configs._sea_lion import instruction_tuning
from sealion_jax.model.config import gemma3_4b
from sealion_jax.recipe import TrainConfig
from sealion_jax.sharding import MeshConfig


def recipe() -> TrainConfig:
    """The stage after `cpt_4b`; `_sea_lion.py` says which settings are published and which are ours."""
    return instruction_tuning(
        "sft_4b",
        model=gemma3_4b(),
        checkpoint="gemma-3-4b-it",
        after="cpt_4b",
        mesh=MeshConfig(data=-1, fsdp=8),
    )
