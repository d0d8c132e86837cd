"""What to say when a write fails because there is no room."""

from __future__ import annotations

import errno
import os
import shutil

from etils import epath

from sealion_jax.errors import UserError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# TensorStore reports the operating system's message inside its own, with no errno attribute.
_NO_ROOM_TEXTS = tuple(os.strerror(number) for number in _NO_ROOM)


def no_room_error(error: BaseException, path: epath.PathLike, *, doing: str) -> UserError | None:
    """The error to show the user if `error` says that storage at `path` is full; None if it says otherwise.

    `doing` names what failed, for the message: "saving step 30". Looks through the chain of causes, because
    asynchronous writers wrap the operating system's error in their own.
    """
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        reason = _reason(link)
        if reason:
            return UserError(
                f"{doing} failed: {reason} at {path} ({_free_space(path)}). "
                "Free some space or choose another place, then run the same command again"
            )
        link = link.__cause__ or link.__context__
    return None


def _reason(error: BaseException) -> str | None:
    """The operating system's words if `error` is about room, else None."""
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return os.strerror(error.errno)
    text = str(error)
    return next((words for words in _NO_ROOM_TEXTS if words in text), None)


def _free_space(path: epath.PathLike) -> str:
    """ "1.2 GB free of 10.0 GB" for the file system that holds `path`, of which only a parent may exist."""
    place = epath.Path(path)
    if "://" in str(place):
        return "free space unknown"
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        usage = shutil.disk_usage(place)
    except OSError:
        return "free space unknown"
    return f"{usage.free / 1e9:.2f} GB free of {usage.total / 1e9:.1f} GB"
