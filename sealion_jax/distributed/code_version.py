"""What of the installed code has to be the same for all processes of a run."""

from __future__ import annotations

import hashlib
import importlib.metadata
import sys
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("sealion_jax", "sealion_kernels")
LIBRARIES = (
    "jax",
    "jaxlib",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "libtpu",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
)
"""A compiled step, a batch or a file would not be the same with another version of these."""


def code_versions() -> dict[str, str]:
    """What runs here, by what it is called; a library that is not installed is left out."""
    versions = {"Python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    for package in PACKAGES:
        versions[f"code of {package}"] = f"sources {sources_digest(package)}"
    for name in LIBRARIES:
        try:
            versions[f"version of {name}"] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def sources_digest(package: str) -> str:
    """Twelve characters that stand for the package's sources, wherever it is installed."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return "none"
    digest = hashlib.sha256()
    for folder in map(Path, spec.submodule_search_locations):
        # Tuned block sizes of kernels are a JSON file.
        for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.json")]):
            digest.update(f"{path.relative_to(folder)}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]
