"""Log-probabilities of a store's answers under a reference model, kept beside the store for every run to use.

    <store>/references/<key>.bin

is a line of JSON (what the key was made of, how far the work is, the numbers' type and sha256), and then the
numbers, one a document, nan where none was computed.

The key is a hash of everything that decides the numbers, so numbers of another model, of other data or of
another precision are never taken for these.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from sealion_jax.data import files

REFERENCES = "references"


class Kept(NamedTuple):
    """What a cache holds."""

    values: Float[np.ndarray, " documents"]
    rows_done: int
    """Rows of the packed store that are computed, from the first on."""


@dataclass(frozen=True, kw_only=True)
class ReferenceCache:
    """The numbers of one key in one folder, which may be remote and need not exist."""

    folder: str
    parts: Mapping[str, str]
    """Everything that decides the numbers, by name."""

    @property
    def key(self) -> str:
        """sha256 of the parts, in hex."""
        return hashlib.sha256(json.dumps(dict(self.parts), sort_keys=True).encode()).hexdigest()

    def read(self, count: int) -> Kept | None:
        """What is there for this key, so many numbers; None where there is nothing, or it is damaged."""
        try:
            line, _, content = files.read_bytes(self._path).partition(b"\n")
            about = json.loads(line)
            is_whole = hashlib.sha256(content).hexdigest() == about["sha256"]
            if not is_whole or about["parts"] != dict(self.parts):
                return None
            values = np.frombuffer(content, {"float32": "<f4", "float64": "<f8"}[about["dtype"]])
            return Kept(values, int(about["rows_done"])) if len(values) == count else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, kept: Kept) -> None:
        """Keeps the numbers; raises OSError where the folder cannot be written."""
        content = kept.values.astype(kept.values.dtype.newbyteorder("<")).tobytes()
        about = {
            "parts": dict(self.parts),
            "dtype": kept.values.dtype.name,
            "rows_done": kept.rows_done,
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        files.write_whole(self._path, json.dumps(about).encode() + b"\n" + content)

    def others(self) -> list[dict[str, str]]:
        """What the numbers of other keys in the folder were made of."""
        found = []
        try:
            names = sorted(files.sizes(self.folder))
        except OSError:  # nothing there yet
            return []
        for name in names:
            try:
                with files.open_binary(files.join(self.folder, name)) as file:
                    parts = json.loads(file.readline())["parts"]
            except (OSError, ValueError, KeyError, TypeError):
                continue
            if parts != dict(self.parts):
                found.append(parts)
        return found

    @property
    def _path(self) -> str:
        return files.join(self.folder, f"{self.key[:32]}.bin")
