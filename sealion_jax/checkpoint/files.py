"""Listing and removing, on disks and on gs://, always as things are now.

epath keeps listings of gs:// in memory, and neither TensorStore's writes nor other processes' show in them: a
manifest made from such a listing would miss files.
"""

from __future__ import annotations

import contextlib

from etils import epath

from sealion_jax.storage import file_system


def file_sizes(directory: epath.PathLike) -> dict[str, int]:
    """Bytes of every file below `directory`, by path relative to it, sorted; empty if there is none."""
    store, root = file_system(directory)
    found = store.find(root, detail=True)
    return {path[len(root) + 1 :]: int(entry["size"]) for path, entry in sorted(found.items())}


def entry_names(directory: epath.PathLike) -> list[str]:
    """Names of the files and directories in `directory`; empty if there is none."""
    store, root = file_system(directory)
    try:
        return [path.rstrip("/").rsplit("/", 1)[-1] for path in store.ls(root, detail=False)]
    except FileNotFoundError:
        return []


def is_there(path: epath.PathLike) -> bool:
    """Whether there is a file or a directory of this name."""
    store, name = file_system(path)
    return store.exists(name)


def remove_tree(path: epath.PathLike) -> None:
    """Removes a directory and all below it, if it is there."""
    store, name = file_system(path)
    if store.exists(name):
        # A repeated request finds nothing where the first one's answer was lost.
        with contextlib.suppress(FileNotFoundError):
            store.rm(name, recursive=True)
