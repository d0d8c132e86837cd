"""The commands as a user runs them: in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def command_environment(*, devices: int = 1, cache: Path | None = None) -> dict[str, str]:
    """The environment of a command on so many CPU devices; those with one `cache` share what they compile."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    if cache is not None:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    return environment


def start(module: str, *arguments: object, environment: dict[str, str], **options) -> subprocess.Popen[str]:
    """`python -m sealion_jax.<module> ...`, started, its output captured as text."""
    command = [sys.executable, "-m", f"sealion_jax.{module}", *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
