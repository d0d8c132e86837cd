"""The names of the files that a token store has, finished or not, and its removal."""

from __future__ import annotations

import json
import re
from pathlib import Path

from sealion_jax.data.growing_file import LOCK, lock_folder
from sealion_jax.data.token_store import ARRAY_DTYPES, MANIFEST

PROGRESS = "progress.json"
SKIPPED = "skipped.jsonl"
HELD_OUT = "held_out.jsonl"
SHARD_NAME = re.compile(r"tokens-\d{5,}\.bin")
# What `files.write_whole` leaves when it is killed.
ASIDE_NAME = re.compile(rf"\.({re.escape(PROGRESS)}|{re.escape(MANIFEST)})-\d+-\d+")


def is_writer_file(name: str) -> bool:
    """Whether a file of this name can only be a writer's, of which nothing else is left."""
    return name == LOCK or ASIDE_NAME.fullmatch(name) is not None


def is_store_file(name: str) -> bool:
    """Whether a finished or unfinished store has files of this name."""
    fixed = {MANIFEST, PROGRESS, SKIPPED, HELD_OUT, *ARRAY_DTYPES}
    return name in fixed or SHARD_NAME.fullmatch(name) is not None or is_writer_file(name)


def discard(folder: Path) -> None:
    """Removes the store in a local folder, finished or not, and nothing else that is there.

    Raises:
        UserError: a writer has it open.
    """
    if not folder.is_dir():
        return
    with lock_folder(folder):
        # The manifest first: without it the rest is no store.
        for name in sorted((path.name for path in folder.iterdir()), key=lambda name: name != MANIFEST):
            if is_store_file(name):
                (folder / name).unlink()


def read_progress(folder: Path) -> dict | None:
    """What the last commit in `folder` recorded, or None."""
    try:
        return json.loads((folder / PROGRESS).read_bytes())
    except FileNotFoundError:
        return None
