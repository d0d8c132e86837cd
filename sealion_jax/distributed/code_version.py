"""What of the installed code, and of its settings, has to be the same for all processes of a run."""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import sys
from collections.abc import Mapping
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
    "tensorstore",
    "grain",
    "sentencepiece",
    "numpy",
    "ml_dtypes",
)
"""A compiled step, a batch or a file would not be the same with another version of these."""

SETTINGS = (
    "JAX_DEFAULT_MATMUL_PRECISION",
    "JAX_DEFAULT_PRNG_IMPL",
    "JAX_DISABLE_MOST_OPTIMIZATIONS",
    "JAX_ENABLE_X64",
    "JAX_EXEC_TIME_OPTIMIZATION_EFFORT",
    "JAX_NUMPY_DTYPE_PROMOTION",
    "JAX_OPTIMIZATION_LEVEL",
    "JAX_RANDOM_SEED_OFFSET",
    "JAX_SOFTMAX_CUSTOM_JVP",
    "JAX_THREEFRY_GPU_KERNEL_LOWERING",
    "JAX_THREEFRY_PARTITIONABLE",
    "JAX_USE_SHARDY_PARTITIONER",
    "NVIDIA_TF32_OVERRIDE",
)
"""Variables of the environment that change what is computed."""
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_OF_A_PLACE = re.compile(r"xla_(dump_|force_host_platform_device_count$)")


def settings(environ: Mapping[str, str]) -> dict[str, str]:
    """What the environment sets that changes numbers, by its name; not what is of one place alone."""
    found = {name: environ[name] for name in SETTINGS if environ.get(name)}
    for variable in _FLAGS:
        for word in environ.get(variable, "").split():
            flag, _, value = word.removeprefix("--").partition("=")
            if flag.startswith("xla_") and not _OF_A_PLACE.match(flag) and "/" not in value:
                found[f"{flag} in {variable}"] = value or "true"
    return found


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
