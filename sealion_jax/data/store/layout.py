"""The names of the files that a token store has, finished or not, and the removal of some or all of them."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path

from sealion_jax.data.store.growing_file import LOCK, lock_folder
from sealion_jax.data.store.manifest import Manifest
from sealion_jax.data.store.references import REFERENCES
from sealion_jax.data.store.token_store import ARRAY_DTYPES, MANIFEST
from sealion_jax.errors import UserError

PROGRESS = "progress.json"
SKIPPED = "skipped.jsonl"
HELD_OUT = "held_out.jsonl"
SHARD_NAME = re.compile(r"tokens-\d{5,}\.bin")
REFERENCE_NAME = re.compile(rf"{REFERENCES}/\.?[0-9a-f]+\.(f32|json)(-\d+-\d+)?")
# What `storage.write_whole` leaves when it is killed.
ASIDE_NAME = re.compile(rf"\.({re.escape(PROGRESS)}|{re.escape(MANIFEST)})-\d+-\d+")


def is_writer_file(name: str) -> bool:
    """Whether a file of this name can only be a writer's, of which nothing else is left."""
    return name == LOCK or ASIDE_NAME.fullmatch(name) is not None


def is_store_file(name: str) -> bool:
    """Whether a finished or unfinished store has files of this name: see `names_in`."""
    if name in {MANIFEST, PROGRESS, SKIPPED, HELD_OUT, *ARRAY_DTYPES} or is_writer_file(name):
        return True
    return any(pattern.fullmatch(name) for pattern in (SHARD_NAME, REFERENCE_NAME))


def names_in(folder: Path) -> list[str]:
    """The names of what is in a folder; what is in its `references` is named `references/...`."""
    names = []
    for path in folder.iterdir():
        is_references = path.name == REFERENCES and path.is_dir()
        names += [f"{REFERENCES}/{inner.name}" for inner in path.iterdir()] if is_references else [path.name]
    return names


def refuse_other_files(folder: Path, *, known: Callable[[str], bool] = is_store_file) -> None:
    """UserError when a folder holds a file whose name is not `known`, so that no store can be made there."""
    others = sorted(name for name in names_in(folder) if not known(name)) if folder.is_dir() else []
    if others:
        raise UserError(
            f"{folder} has other files in it ({', '.join(others[:3])}); choose an empty output folder"
        )


def leftovers(folder: Path, manifest: Manifest) -> list[str]:
    """The names of the files in a finished store's folder that only its writer needed, the lock last."""
    shards = {shard.name for shard in manifest.shards}
    names = [
        path.name
        for path in folder.iterdir()
        if path.name in (PROGRESS, HELD_OUT)
        or is_writer_file(path.name)
        or (SHARD_NAME.fullmatch(path.name) and path.name not in shards)
    ]
    return sorted(names, key=lambda name: name == LOCK)


def tidy(folder: Path, manifest: Manifest) -> None:
    """Removes what only the writer needed from a finished store's folder, which the caller holds locked."""
    for name in leftovers(folder, manifest):
        with contextlib.suppress(FileNotFoundError):
            (folder / name).unlink()


def discard(folder: Path) -> None:
    """Removes the store in a local folder, finished or not, and nothing else that is there.

    Raises:
        UserError: a writer has it open.
    """
    if not folder.is_dir():
        return
    with lock_folder(folder):
        # The manifest first: without it the rest is no store.
        for name in sorted(names_in(folder), key=lambda name: name != MANIFEST):
            if is_store_file(name):
                (folder / name).unlink()
        with contextlib.suppress(OSError):  # there is none, or it has other files
            (folder / REFERENCES).rmdir()


def read_progress(folder: Path) -> dict | None:
    """What the last commit in `folder` recorded, or None."""
    try:
        return json.loads((folder / PROGRESS).read_bytes())
    except FileNotFoundError:
        return None
