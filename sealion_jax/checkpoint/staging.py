"""A directory that appears at its place only when all of it is written."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
from collections.abc import Iterator

from etils import epath

from sealion_jax.checkpoint.space import no_room_error
from sealion_jax.errors import UserError

_PARTIAL = ".partial-"


@contextlib.contextmanager
def new_directory(target: epath.PathLike, *, needs_bytes: int = 0) -> Iterator[epath.Path]:
    """A place to write what `target` will hold; it gets that name when the block ends without an error.

    After an error nothing is left. What a killed process left beside `target` is removed by the next one.
    On gs:// there is no renaming, so `target` itself is given: write last what makes it valid.

    Raises:
        UserError: `target` exists and is not empty, or there is no room.
    """
    target = epath.Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not empty; give another place, or remove it first")
    if "://" in str(target):
        yield target
        return
    target = epath.Path(os.path.abspath(target.expanduser()))
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    free = shutil.disk_usage(target.parent).free
    if free < needs_bytes:
        raise UserError(
            f"{target.parent} has {free / 1e9:.1f} GB free, this takes {needs_bytes / 1e9:.1f} GB; free some "
            "space or give another place"
        )
    partial = target.parent / f"{_stem(target)}{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        os.replace(partial, target)
    except Exception as error:
        full = no_room_error(error, target.parent, doing=f"writing {target}")
        if full is not None:
            raise full from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _stem(target: epath.Path) -> str:
    return f".{target.name}{_PARTIAL}{socket.gethostname()}-"


def _remove_leftovers(target: epath.Path) -> None:
    """Removes what processes of this machine that are gone left of `target`."""
    for entry in target.parent.iterdir():
        number = entry.name.removeprefix(_stem(target))
        if entry.name.startswith(_stem(target)) and number.isdecimal() and not _is_running(int(number)):
            print(f"removing {entry}, left by a process that was killed", file=sys.stderr)
            shutil.rmtree(entry, ignore_errors=True)


def _is_running(process: int) -> bool:
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
