"""A token store's way into a bucket, and out of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from sealion_jax.data.store.layout import SKIPPED, discard, is_store_file
from sealion_jax.data.store.manifest import Manifest
from sealion_jax.data.store.references import REFERENCES
from sealion_jax.data.store.token_store import MANIFEST
from sealion_jax.storage import file_system


def upload(folder: Path, output: str, manifest: Manifest, on_bytes: Callable[[int], object]) -> None:
    """Copies a finished store to a bucket, its manifest last, and removes it here."""
    system, there = file_system(output)
    for file in (*manifest.shards, *manifest.arrays):
        system.put_file(str(folder / file.name), f"{there}/{file.name}")
        on_bytes(file.bytes)
    for name in (SKIPPED, MANIFEST):
        system.put_file(str(folder / name), f"{there}/{name}")
    _remove(folder)


def drop_copy(folder: Path, manifest: Manifest) -> None:
    """Removes the store in a local folder if it is the finished one of this manifest."""
    where = folder / MANIFEST
    if where.exists() and Manifest.from_json(where.read_bytes(), str(where)) == manifest:
        _remove(folder)


def _remove(folder: Path) -> None:
    discard(folder)
    with contextlib.suppress(OSError):
        folder.rmdir()


def discard_remote(output: str) -> None:
    """Removes the store in a bucket, finished or not, and nothing else that is there."""
    system, folder = file_system(output)
    names = [os.path.basename(path) for path in system.glob(f"{folder}/*")]
    names += [f"{REFERENCES}/{os.path.basename(path)}" for path in system.glob(f"{folder}/{REFERENCES}/*")]
    # The manifest first: without it the rest is no store.
    for name in (MANIFEST, *names):
        if is_store_file(name) and system.exists(f"{folder}/{name}"):
            system.rm_file(f"{folder}/{name}")
