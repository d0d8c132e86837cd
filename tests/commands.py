"""The commands as a user runs them: in processes of their own, or in the test's."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

_SETTINGS = (
    "jax_default_matmul_precision",
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_enable_xla_caches",
)


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


def free_port() -> int:
    """A port of this machine at which nobody listened a moment ago."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_together(
    module: str, *arguments: object, processes: int, environment: dict[str, str]
) -> list[subprocess.Popen[str]]:
    """The command as so many processes of one run, joined over this machine's own network."""
    together = ["--coordinator-address", f"127.0.0.1:{free_port()}", "--num-processes", processes]
    return [
        start(module, *arguments, *together, "--process-id", number, environment=environment)
        for number in range(processes)
    ]


@contextlib.contextmanager
def commands_in_this_process(*, cache: Path | None = None) -> Iterator[None]:
    """Sets back in the end what commands set for their process; with a `cache` they share what they compile.

    A run without one keeps it in its own directory.
    """
    handler = signal.getsignal(signal.SIGTERM)
    before = {name: getattr(jax.config, name) for name in _SETTINGS}
    jax.config.update("jax_default_matmul_precision", None)
    if cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
