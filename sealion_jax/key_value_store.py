"""The store of keys and values by which the processes of a run speak where no collective may: JAX's own.

It lives in process 0, is there from joining to the end and needs no device, so it is reached from any thread,
beside training and while a device or storage hangs. JAX keeps it in a private module, which is touched here
alone; Orbax takes it from there too.
"""

from __future__ import annotations

from typing import Protocol


class KeyValueStore(Protocol):
    """What is used of JAX's `DistributedRuntimeClient`, under its names; every call may fail, or take long.

    Keys are paths ("sealion_jax/ends/count"); those below one are a folder.
    """

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        """Keeps the value; fails where the key has one that is not to be overwritten."""

    def key_value_try_get(self, key: str) -> str:
        """The key's value; fails where there is none."""
        ...

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        """The key's value, which is waited for; fails where none comes in that time."""
        ...

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        """The keys in this folder, as they were set, and their values."""
        ...

    def key_value_increment(self, key: str, increment: int) -> int:
        """The key's number with the increment added to it, from now on; it begins at 0."""
        ...

    def key_value_delete(self, key: str) -> None:
        """Removes the key, and all in its folder."""

    def wait_at_barrier(self, barrier_id: str, timeout_in_ms: int) -> None:
        """Returns when all processes wait there; fails where one does not come in that time."""


def key_value_store() -> KeyValueStore:
    """The store of this run.

    Raises:
        RuntimeError: there is none, and so nobody to speak with: the process is alone, has not joined the
            others yet, or has left them.
    """
    from jax._src import distributed  # here, so that heartbeats are read without JAX

    client = distributed.global_state.client
    if client is None:
        raise RuntimeError("no store of keys and values: this process is alone, or not joined to the others")
    return client
