"""Instruction tuning of continued Gemma 3 27B.

    export SEALION_BUCKET=gs://BUCKET      # holds chats/<language>, runs/cpt_27b and gemma-3-27b-it
    python -m sealion_jax.train sft_27b --run-dir /shared/runs/sft_27b

Weights and optimizer state take 324 GB in float32, split over all devices, 16 or more, 128 at most.
"""

from __future__ import annotations

from sealion_configs._sea_lion import instruction_tuning
from sealion_jax.model.config import gemma3_27b
from sealion_jax.recipe import TrainConfig
from sealion_jax.sharding import MeshConfig


def recipe() -> TrainConfig:
    """The stage after `cpt_27b`; `_sea_lion.py` says which settings are published and which are ours."""
    return instruction_tuning(
        "sft_27b",
        model=gemma3_27b(),
        checkpoint="gemma-3-27b-it",
        after="cpt_27b",
        mesh=MeshConfig(fsdp=-1),
    )
