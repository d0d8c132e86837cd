"""How the processes of a run end, told through JAX's own service: it is there when storage is what fails."""

from __future__ import annotations

import contextlib

from sealion_jax.key_value_store import key_value_store


class Ends:
    """What the processes of one attempt tell each other when they end; every call may fail, or take long.

    They are many, so each asks for one number and one text, and nobody for what every other has told.
    """

    def __init__(self, attempt: str) -> None:
        self._folder = f"sealion_jax/ends/{attempt}"

    def tell(self, mistake: str | None) -> None:
        """This process ends, and is counted; with a mistake of the user's, of which the first is kept."""
        store = key_value_store()
        if mistake is not None:
            with contextlib.suppress(Exception):  # there is one
                store.key_value_set(f"{self._folder}/mistake", mistake, allow_overwrite=False)
        store.key_value_increment(f"{self._folder}/count", 1)

    def count(self) -> int:
        """How many have told of their end."""
        return key_value_store().key_value_increment(f"{self._folder}/count", 0)

    def mistake(self) -> str | None:
        """The user's mistake that a process has met; None while there is none."""
        try:
            return key_value_store().key_value_try_get(f"{self._folder}/mistake")
        except Exception:  # there is none, or the service has no time
            return None
