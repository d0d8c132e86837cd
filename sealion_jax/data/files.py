"""Files that may be on this machine or in a bucket: sizes, contents and copies.

A path with "://" in it is remote and goes through fsspec (gs:// is gcsfs), because a ranged read there is one
request; everything else is a local path.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import BinaryIO, cast

from sealion_jax import storage
from sealion_jax.storage import is_remote, write_whole

__all__ = [
    "copy_whole",
    "exists",
    "is_remote",
    "join",
    "open_binary",
    "read_bytes",
    "size",
    "sizes",
    "user_cache",
    "write_whole",
]


def join(folder: object, *names: str) -> str:
    """`folder/name/...` as a string, for local and remote paths."""
    return "/".join([str(folder).rstrip("/"), *names])


def exists(path: str) -> bool:
    if not is_remote(path):
        return os.path.exists(path)
    system, name = storage.file_system(path)
    return system.exists(name)


def size(path: str) -> int:
    """Bytes of a file; raises FileNotFoundError."""
    if not is_remote(path):
        return os.path.getsize(path)
    system, name = storage.file_system(path)
    return int(system.info(name)["size"])


def sizes(folder: str) -> dict[str, int]:
    """Name and bytes of each file in a folder, with one request where it is remote."""
    if not is_remote(folder):
        return {entry.name: entry.stat().st_size for entry in os.scandir(folder) if entry.is_file()}
    system, inner = storage.file_system(folder)
    listed = system.ls(inner, detail=True)
    return {os.path.basename(entry["name"]): entry["size"] for entry in listed if entry["type"] == "file"}


def open_binary(path: str) -> BinaryIO:
    """An open file to read from its beginning."""
    if not is_remote(path):
        return open(path, "rb")
    system, name = storage.file_system(path)
    return cast(BinaryIO, system.open(name, "rb"))


def read_bytes(path: str) -> bytes:
    with open_binary(path) as file:
        return file.read()


def user_cache() -> Path:
    """Where to keep what can be had again: $XDG_CACHE_HOME/sealion_jax, or ~/.cache/sealion_jax."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "sealion_jax"


def copy_whole(source: Path, target: str) -> None:
    """Copies a local file to a path that may be remote; it is there whole or not at all, whoever copies."""
    if is_remote(target):
        system, name = storage.file_system(target)
        system.put_file(str(source), name)
        return
    with storage.place_aside(Path(target)) as aside:
        shutil.copyfile(source, aside)
        os.replace(aside, target)
