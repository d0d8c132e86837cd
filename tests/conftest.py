"""Fixtures that every package's tests share. Tests see eight CPU devices, so that meshes can be made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FORCE_EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"

# Before JAX starts, so before any test module is imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FORCE_EIGHT_DEVICES}".strip()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: the quick ones fill what is left of each process's time in the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


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
