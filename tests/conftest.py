"""Fixtures that every package's tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real texts and tokenizers; SEALION_SHARED_DATA names another than ../shared/data."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SEALION_SHARED_DATA", default))
    if not (folder / "MANIFEST.md").exists():
        pytest.skip(
            f"no shared data at {folder}: set SEALION_SHARED_DATA to the folder that holds MANIFEST.md"
        )
    return folder
