"""Whether what `prepare` writes lies among what it reads."""

from __future__ import annotations

import fnmatch
import glob
import os
from collections.abc import Iterator, Sequence

import fsspec

from sealion_jax.data import files
from sealion_jax.data.store.layout import HELD_OUT, PROGRESS, SKIPPED
from sealion_jax.data.store.manifest import StoreKind
from sealion_jax.data.store.references import REFERENCES
from sealion_jax.data.store.token_store import ARRAY_DTYPES, MANIFEST
from sealion_jax.errors import UserError

_STORE_FILES = (MANIFEST, PROGRESS, SKIPPED, HELD_OUT, "tokens-00000.bin", *ARRAY_DTYPES)
_REFERENCE_FILES = (f"{REFERENCES}/0.f32", f"{REFERENCES}/0.json")


def refuse_overlaps(
    inputs: Sequence[str], output: str, held_out: str | None, *, kind: StoreKind = "text"
) -> None:
    """UserError when what is written would be read the next time, or would take the place of what is read.

    Args:
        inputs: files, folders and patterns.
        output: the store's folder.
        held_out: the file of the documents held out.
        kind: what the store holds; beside pairs, references will be written.
    """
    names = (*_STORE_FILES, *(_REFERENCE_FILES if kind == "pairs" else ()))
    written = {output: [files.join(output, name) for name in names]}
    if held_out is not None:
        written.setdefault(held_out, []).append(held_out)
    for name in (name for name in inputs if not name.startswith("tfds:")):
        for path, inside in written.items():
            if _holds(name, path) or any(_matches(name, file) for file in inside):
                raise UserError(
                    f"{path} is to be written, and {name} is an input; choose another place for it"
                )
    if held_out is not None and os.path.dirname(_place(held_out)) == _place(output):
        raise UserError(f"the held-out documents cannot go into the store {output}; choose another place")


def _holds(name: str, path: str) -> bool:
    """Whether an input is this very path, or a folder that it is in."""
    source, place = _place(name), _place(path)
    is_folder = "://" in source or os.path.isdir(source)
    return place == source or (is_folder and place.startswith(source.rstrip("/") + "/"))


def _matches(name: str, path: str) -> bool:
    """Whether an input is a pattern that a file at this path would fit."""
    if not glob.has_magic(name):
        return False
    return any(
        _fit(found.split("/"), pattern.split("/"))
        for found in {_place(path), _spelled(path)}
        for pattern in _patterns(name)
    )


def _patterns(name: str) -> Iterator[str]:
    """The pattern from the root on, as it is spelled and with the links before its wildcards followed."""
    spelled = _spelled(name)
    yield spelled
    parts = spelled.split("/")
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    if "://" not in spelled:
        yield "/".join([os.path.realpath("/".join(parts[:fixed]) or "/").rstrip("/"), *parts[fixed:]])


def _fit(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path's parts fit a pattern's, of which `**` stands for any number of parts."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_fit(parts[skipped:], pattern[1:]) for skipped in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _fit(parts[1:], pattern[1:])


def _place(name: str) -> str:
    """Where a path leads, so that two spellings of one place are equal: links followed on this machine."""
    spelled = _spelled(name)
    return spelled if "://" in spelled else os.path.realpath(spelled)


def _spelled(name: str) -> str:
    """The path from the root on, or with its protocol where it is on no disk of this machine."""
    if not files.is_remote(name):
        return os.path.abspath(name)
    system, inner = fsspec.core.url_to_fs(name)
    return (
        os.path.abspath(inner) if "file" in _protocols(system) else system.unstrip_protocol(inner.rstrip("/"))
    )


def _protocols(system: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    return (system.protocol,) if isinstance(system.protocol, str) else tuple(system.protocol)
