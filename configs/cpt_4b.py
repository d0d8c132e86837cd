"""SEA-LION v4's continued pre-training, on Gemma 3 4B.

    export SEALION_BUCKET=gs://BUCKET      # holds stores/<source> and gemma-3-4b-it
    python -m sealion_jax.train cpt_4b --run-dir /shared/runs/cpt_4b

Weights and optimizer state take 47 GB in float32, split over eight devices; more devices
hold further copies.
"""

from __future__ import annotations

from sealion_configs._sea_lion import continued_pretraining
from sealion_jax.model.config import gemma3_4b
from sealion_jax.recipe import TrainConfig
from sealion_jax.sharding import MeshConfig


def recipe() -> TrainConfig:
    """The published mixture and settings; `_sea_lion.py` says which are published and which are ours."""
    return continued_pretraining(
        "cpt_4b",
        model=gemma3_4b(),
        checkpoint="gemma-3-4b-it",
        mesh=MeshConfig(data=-1, fsdp=8),
    )
