"""Files in buckets: the client that all of them go through, and whether a run directory can be written.

What gcsfs tries again by itself, up to six times with pauses of half a minute together: 408, 429, 500 to
504, and connections that break; TensorStore does so up to 32 times. `prepare_clients` adds, for both, a
server that takes a request and never answers. Errors that stay (403, no such bucket) are raised at once.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import threading
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec
from fsspec.config import conf

from sealion_jax.errors import UserError

_CONNECT_SECONDS = 20
_SILENCE_SECONDS = 60
_TENSORSTORE = {
    "TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS": str(_CONNECT_SECONDS),
    "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": str(_SILENCE_SECONDS),
    "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1",
}
"""Settings that it takes from the environment alone, and reads before its first request."""
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""What file systems say that have no second names for a file."""
_PROBE = b"sealion_jax: whether this place can be written; may be removed\n"


def is_remote(path: object) -> bool:
    """Whether it is a URL, such as gs://bucket/folder, and no path of this machine."""
    return "://" in str(path)


def file_system(path: object, *, silence_seconds: float | None = None) -> tuple[Any, str]:
    """fsspec's file system for a path, without a memory of listings, and the path inside it.

    Args:
        silence_seconds: after which a request to a bucket that gets no answer is tried again; None for a
            minute, or what the user has set.
    """
    prepare_clients()
    options: dict[str, Any] = {"use_listings_cache": False}
    if silence_seconds is not None and str(path).startswith(("gs://", "gcs://")):
        options["requests_timeout"] = _timeout(silence_seconds)
    system, inner = fsspec.core.url_to_fs(str(path), **options)
    return system, inner.rstrip("/")


def prepare_clients() -> None:
    """Sets how this process's clients of gs:// behave, those that epath and Orbax make as well.

    They keep no listings: neither TensorStore's writes nor other processes' would show in them. A request
    that gets no answer for a minute is tried again, as one whose connection breaks; in TensorStore too,
    unless the user has set that otherwise in the environment.
    """
    if "requests_timeout" in conf.get("gs", {}):
        return
    for name, value in _TENSORSTORE.items():
        os.environ.setdefault(name, value)
    timeout = _timeout(_SILENCE_SECONDS)
    for protocol in ("gs", "gcs"):  # what the user has set in fsspec's own files stays
        conf[protocol] = {"use_listings_cache": False, "requests_timeout": timeout, **conf.get(protocol, {})}


def _timeout(silence_seconds: float) -> Any:
    """aiohttp's settings for a server that may be silent for so long."""
    from aiohttp import ClientTimeout

    connect_seconds = min(_CONNECT_SECONDS, silence_seconds)
    return ClientTimeout(total=None, sock_connect=connect_seconds, sock_read=silence_seconds)


def write_whole(
    path: object, content: bytes, *, synced: bool = True, silence_seconds: float | None = None
) -> None:
    """Writes a file so that it is there with all its content or not at all, whatever else writes it.

    Args:
        synced: also over a power cut; what only has to be seen by others now need not wait for the disk.
        silence_seconds: as `file_system` takes it.
    """
    if is_remote(path):
        system, inner = file_system(path, silence_seconds=silence_seconds)
        system.pipe_file(inner, content)
        return
    file = Path(str(path))
    with _aside(file, content, synced=synced) as aside:
        os.replace(aside, file)
    if synced:
        _sync_folder(file.parent)


def create(
    path: object, content: bytes, *, synced: bool = True, silence_seconds: float | None = None
) -> None:
    """Writes a new file, whole or not at all; raises FileExistsError if there is one, whoever was first.

    In a bucket also when it is our own: an answer got lost, and the request was repeated.

    Args:
        synced: as `write_whole` takes it; `silence_seconds` too.
    """
    if is_remote(path):
        system, inner = file_system(path, silence_seconds=silence_seconds)
        system.pipe_file(inner, content, mode="create")
        return
    file = Path(str(path))
    with _aside(file, content, synced=synced) as aside:
        try:
            os.link(aside, file)
        except FileExistsError:
            raise
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with open(file, "xb") as out:
                out.write(content)
    if synced:
        _sync_folder(file.parent)


@contextlib.contextmanager
def place_aside(file: Path) -> Iterator[Path]:
    """A path beside `file` of a disk, nobody else's, to write to before it is put there; gone in the end."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}-{uuid.uuid4().hex}")
    try:
        yield aside
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def _aside(file: Path, content: bytes, *, synced: bool) -> Iterator[Path]:
    """A file of this content beside `file`, in whose place it may be put; gone in the end."""
    with place_aside(file) as aside:
        with open(aside, "wb") as out:
            out.write(content)
            if synced:
                out.flush()
                os.fsync(out.fileno())
        yield aside


def _sync_folder(folder: Path) -> None:
    """Has the names of a folder outlive a power cut, where its file system can do that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems sync no folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def add_line(path: object, plain: Mapping[str, Any], *, synced: bool = True) -> None:
    """Adds a JSON object to a small file of lines, which is written anew: a bucket's cannot grow."""
    before, line = _content(path), json.dumps(plain, ensure_ascii=False) + "\n"
    if before and not before.endswith(b"\n"):  # torn: the new line is one of its own
        before += b"\n"
    write_whole(path, before + line.encode(), synced=synced)


def read_lines(path: object) -> list[dict[str, Any]]:
    """The JSON objects of a file of lines, oldest first; none where there is no file.

    A line that is none, torn or altered, is left out.
    """
    found: list[dict[str, Any]] = []
    for line in _content(path).splitlines():
        with contextlib.suppress(ValueError):
            plain = json.loads(line)
            if isinstance(plain, dict):
                found.append(plain)
    return found


def _content(path: object) -> bytes:
    system, inner = file_system(path)
    try:
        return system.cat_file(inner)
    except FileNotFoundError:
        return b""


def remove(path: object) -> None:
    """Removes a file, if it is there; an answer that got lost and the repeated request count as one."""
    if is_remote(path):
        system, inner = file_system(path)
        with contextlib.suppress(FileNotFoundError):
            system.rm_file(inner)
    else:
        Path(str(path)).unlink(missing_ok=True)


def require_writable(folder: str, *, limit_seconds: float = 90) -> None:
    """Raises UserError unless a file can be written to `folder`, read back and removed, within the limit."""
    with writable(folder, limit_seconds=limit_seconds):
        pass


@contextlib.contextmanager
def writable(folder: str, *, limit_seconds: float = 90) -> Iterator[None]:
    """`require_writable`, and while the block runs the folder is there, for others that probe it too.

    Folders of a disk that were not there before are taken away again in the end, unless there is something in
    them by then.
    """
    if is_remote(folder) and not folder.split("://", 1)[1].strip("/"):
        raise UserError(f"{folder} names no bucket; give gs://bucket/folder")
    failure: list[BaseException] = []
    made: list[Path] = []

    def probe() -> None:
        try:
            made.extend(_missing_folders(folder))
            _probe(folder)
        except BaseException as error:
            failure.append(error)

    # A thread of its own: the lookup of an account, for one, has no limit that could be set.
    thread = threading.Thread(target=probe, name="probe", daemon=True)
    thread.start()
    thread.join(limit_seconds)
    if thread.is_alive():
        raise UserError(
            f"{folder} cannot be written: no answer within {limit_seconds:.0f} s. Check that this machine "
            "reaches the storage and has an account for it (gcloud auth application-default login, or "
            "GOOGLE_APPLICATION_CREDENTIALS), or give another --run-dir"
        )
    try:
        if failure:
            raise UserError(f"{folder} cannot be written: {_explained(folder, failure[0])}") from failure[0]
        yield
    finally:
        for one in made:
            with contextlib.suppress(OSError):  # another process has put something there by now
                one.rmdir()


def _probe(folder: str) -> None:
    path = f"{folder.rstrip('/')}/.writable-{uuid.uuid4().hex}"
    with _silenced("gcsfs", "google.auth"):
        write_whole(path, _PROBE)
        try:
            system, inner = file_system(path)
            found = system.cat_file(inner)
            if found != _PROBE:
                raise OSError(f"what was written is not what is read back ({len(found)} bytes)")
        finally:
            remove(path)


def _missing_folders(folder: str) -> list[Path]:
    """Which folders of a disk are made when something is written to this one, the innermost first."""
    place = Path(folder)
    return [] if is_remote(folder) else [one for one in (place, *place.parents) if not one.exists()]


@contextlib.contextmanager
def _silenced(*names: str) -> Iterator[None]:
    """Keeps libraries from printing, traceback and all, an error that is told in one line."""
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _explained(folder: str, error: BaseException) -> str:
    """What an error of the probe means, and what to do."""
    said = " ".join(str(error).split()) or type(error).__name__
    code = str(getattr(error, "code", "") or "")
    if not is_remote(folder):
        if isinstance(error, FileExistsError | NotADirectoryError):
            return "a file is in the way of this folder. Remove it, or give another --run-dir"
        reason = getattr(error, "strerror", None) or said
        return f"{reason}. Give a --run-dir on a disk with room that this account may write to"
    bucket = folder.split("://", 1)[1].partition("/")[0]
    if isinstance(error, FileNotFoundError):
        return f"there is no bucket {bucket}. Make it, or give another --run-dir"
    if code == "401" or "Anonymous caller" in said:
        return (
            f"401, this machine has no account for {bucket} ({said}). Run gcloud auth application-default "
            "login, or set GOOGLE_APPLICATION_CREDENTIALS"
        )
    if said.startswith("Forbidden") or code == "403":
        return (
            f"403, the account may not write there ({said}). Give it roles/storage.objectUser on the bucket, "
            "which may read, write and delete, or give another --run-dir"
        )
    return f"{said}. Try again later, or give another --run-dir"
