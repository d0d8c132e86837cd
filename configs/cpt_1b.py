"""SEA-LION v4's continued pre-training, on Gemma 3 1B.

    export SEALION_BUCKET=gs://BUCKET      # holds stores/<source> and gemma-3-1b-it
    python -m sealion_jax.train cpt_1b --run-dir /shared/runs/cpt_1b

Weights and optimizer state take 12 GB in float32, split over four devices; more devices
hold further copies.
"""

from __future__ import annotations

from sealion_configs._sea_lion import continued_pretraining
from sealion_jax.model.config import gemma3_1b
from sealion_jax.recipe import TrainConfig
from sealion_jax.sharding import MeshConfig


def recipe() -> TrainConfig:
    """The published mixture and settings; `_sea_lion.py` says which are published and which are ours."""
    return continued_pretraining(
        "cpt_1b",
        model=gemma3_1b(),
        checkpoint="gemma-3-1b-it",
        mesh=MeshConfig(data=-1, fsdp=4),
    )
