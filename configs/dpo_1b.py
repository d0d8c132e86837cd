"""Preference optimisation of instruction-tuned Gemma 3 1B.

    export SEALION_BUCKET=gs://BUCKET      # holds pairs/<language>, runs/sft_1b and gemma-3-1b-it
    python -m sealion_jax.train dpo_1b --run-dir /shared/runs/dpo_1b

Weights and optimizer state take 12 GB in float32, split over four devices.
"""

from __future__ import annotations

from sealion_configs._sea_lion import preference_optimisation
from sealion_jax.model.config import gemma3_1b
from sealion_jax.recipe import TrainConfig
from sealion_jax.sharding import MeshConfig


def recipe() -> TrainConfig:
    """The stage after `sft_1b`; `_sea_lion.py` says which settings are published and which are ours."""
    return preference_optimisation(
        "dpo_1b",
        model=gemma3_1b(),
        checkpoint="gemma-3-1b-it",
        after="sft_1b",
        mesh=MeshConfig(data=-1, fsdp=4),
    )
