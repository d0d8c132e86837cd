"""Listing and removing, on disks and on gs://, always as things are now.

epath keeps listings of gs:// in memory, and neither TensorStore's writes nor other processes' show in them: a
manifest made from such a listing would miss files.
"""

from __future__ import annotations

from typing import Any

import fsspec
from etils import epath


def file_sizes(directory: epath.PathLike) -> dict[str, int]:
    """Bytes of every file below `directory`, by path relative to it, sorted; empty if there is none."""
    store, root = _store(directory)
    found = store.find(root, detail=True)
    return {path[len(root) + 1 :]: int(entry["size"]) for path, entry in sorted(found.items())}


def entry_names(directory: epath.PathLike) -> list[str]:
    """Names of the files and directories in `directory`; empty if there is none."""
    store, root = _store(directory)
    try:
        return [path.rstrip("/").rsplit("/", 1)[-1] for path in store.ls(root, detail=False)]
    except FileNotFoundError:
        return []


def is_there(path: epath.PathLike) -> bool:
    """Whether there is a file or a directory of this name."""
    store, name = _store(path)
    return store.exists(name)


def remove_tree(path: epath.PathLike) -> None:
    """Removes a directory and all below it, if it is there."""
    store, name = _store(path)
    if store.exists(name):
        store.rm(name, recursive=True)


def _store(path: epath.PathLike) -> tuple[Any, str]:
    """fsspec's file system for a path, without its memory of listings, and the path inside it."""
    store, name = fsspec.core.url_to_fs(str(path), use_listings_cache=False)
    return store, name.rstrip("/")
