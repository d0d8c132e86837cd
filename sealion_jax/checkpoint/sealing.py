"""The last act of a save: all processes hash their shares of the files, and the first one writes the digests.

It happens in the background, beside training, where no collective may run. So the processes speak through
their store of keys and values.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from sealion_jax.checkpoint.digests import measure, unmeasured, write_manifest
from sealion_jax.checkpoint.processes import num_processes
from sealion_jax.errors import UserError
from sealion_jax.key_value_store import KeyValueStore, key_value_store

_FOLDER = "sealion_jax/sealing"
_NAMES, _SHARE, _SEALED = "names", "share", "sealed"
_numbers = itertools.count()


class Sealing:
    """One save's end, made on all processes alike and in the same order; methods may run in a thread.

    Process 0 calls `lead`, the others `follow`; both return when the digests are written. What one process
    gives up for is raised on all the others: as a UserError if it is one, else as a RuntimeError.
    """

    def __init__(
        self,
        directory: epath.Path,
        *,
        number: int,
        process: int,
        processes: int,
        store: KeyValueStore | None,
        limit_seconds: float,
    ) -> None:
        """
        Args:
            store: None where this process is the only one.
        """
        self._directory = directory
        self._number = number
        self._own, self._all = process, processes
        self._store = store
        self._limit_ms = int(limit_seconds * 1000)

    @classmethod
    def next(cls, directory: epath.Path, *, limit_seconds: float) -> Sealing:
        """That of the next save of this run."""
        processes = num_processes()
        return cls(
            directory,
            number=next(_numbers),
            process=jax.process_index() if processes > 1 else 0,
            processes=processes,
            store=key_value_store() if processes > 1 else None,
            limit_seconds=limit_seconds,
        )

    def lead(self, *, may_write: Callable[[], None]) -> None:
        """Has all files below the directory hashed, and writes what was found.

        Args:
            may_write: raises if the directory is another run's by now.
        """
        names = unmeasured(self._directory)
        self._tell(_NAMES, names)
        measured = dict(measure(self._directory, names[:: self._all]))
        for process in range(1, self._all):
            measured |= self._hear(f"{_SHARE}/{process}", process)
        write_manifest(self._directory, measured, may_write=may_write)
        self._tell(_SEALED, True)

    def follow(self) -> None:
        """Hashes this process's share of the files, and waits until the digests are written."""
        names = self._hear(_NAMES, 0)
        self._tell(f"{_SHARE}/{self._own}", measure(self._directory, names[self._own :: self._all]))
        self._hear(_SEALED, 0)

    def give_up(self, error: BaseException) -> None:
        """Tells the others, whatever they wait for, that this process met an error."""
        is_users = isinstance(error, UserError)
        said = str(error) if is_users else f"{type(error).__name__}: {error}"
        keys = (_NAMES, _SEALED) if self._own == 0 else (f"{_SHARE}/{self._own}",)
        for key in keys:
            self._put(key, {"error": said, "is_users": is_users})

    def _tell(self, key: str, result: Any) -> None:
        self._put(key, {"result": result})

    def _put(self, key: str, answer: dict[str, Any]) -> None:
        if self._store is not None:
            if self._own == 0 and self._number > 0:  # all have read those: they take part in this save
                self._store.key_value_delete(f"{_FOLDER}/{self._number - 1}/")
            self._store.key_value_set(self._key(key), json.dumps(answer), allow_overwrite=True)

    def _hear(self, key: str, process: int) -> Any:
        assert self._store is not None  # a process that is alone hears nobody
        answer = json.loads(self._store.blocking_key_value_get(self._key(key), self._limit_ms))
        if "error" in answer:
            kind = UserError if answer["is_users"] else RuntimeError
            raise kind(f"process {process}: {answer['error']}")
        return answer["result"]

    def _key(self, key: str) -> str:
        return f"{_FOLDER}/{self._number}/{key}"
