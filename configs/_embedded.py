"""What the embedded recipes share: sources and held-out sets of a part of the corpus in the package."""

from __future__ import annotations

from sealion_jax.data.mixture import SourceConfig
from sealion_jax.embedded import EmbeddedPart
from sealion_jax.evaluation.config import EvaluationConfig

SEQUENCE_LENGTH_TOKENS = 256
BATCH_SIZE = 8


def sources(part: EmbeddedPart) -> tuple[SourceConfig, ...]:
    """Thirteen languages in equal parts."""
    return tuple(
        SourceConfig(name=language, store=str(store), weight=1.0) for language, store in part.stores.items()
    )


def evaluation(name: str, part: EmbeddedPart) -> EvaluationConfig:
    """The held-out rows of all languages as one set."""
    return EvaluationConfig(sets={name: str(part.all_heldout)}, batch_size=BATCH_SIZE)
