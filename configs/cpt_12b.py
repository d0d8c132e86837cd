"""SEA-LION v4's continued pre-training, on Gemma 3 12B.

    export SEALION_BUCKET=gs://BUCKET      # holds stores/<source> and gemma-3-12b-it
    python -m sealion_jax.train cpt_12b --run-dir /shared/runs/cpt_12b

Weights and optimizer state take 141 GB in float32: split over all devices, 16 or more.
"""

from __future__ import annotations

from sealion_configs._sea_lion import continued_pretraining
from sealion_jax.model.config import gemma3_12b
from sealion_jax.recipe import TrainConfig
from sealion_jax.sharding import MeshConfig


def recipe() -> TrainConfig:
    """The published mixture and settings; `_sea_lion.py` says which are published and which are ours."""
    return continued_pretraining(
        "cpt_12b",
        model=gemma3_12b(),
        checkpoint="gemma-3-12b-it",
        mesh=MeshConfig(fsdp=-1),
    )
