"""Processes, here threads with a store of keys between them, seal a checkpoint together."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from etils import epath

from sealion_jax.checkpoint import sealing
from sealion_jax.checkpoint.digests import check_digests
from sealion_jax.checkpoint.sealing import Sealing
from sealion_jax.errors import UserError

PROCESSES = 3


class Store:
    """What JAX's store of keys and values does, within one process."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self._changed = threading.Condition()

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        with self._changed:
            assert allow_overwrite or key not in self.values
            self.values[key] = value
            self._changed.notify_all()

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        with self._changed:
            if not self._changed.wait_for(lambda: key in self.values, timeout_in_ms / 1000):
                raise TimeoutError(key)
            return self.values[key]

    def key_value_delete(self, key: str) -> None:
        with self._changed:
            for known in [known for known in self.values if known.startswith(key)]:
                del self.values[known]


@pytest.fixture
def folder(tmp_path: Path) -> epath.Path:
    for number in range(7):
        file = tmp_path / f"part{number % 2}" / f"{number}.bin"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(bytes(range(10 * number)))
    return epath.Path(tmp_path)


def seal(folder: epath.Path, store: Store, number: int, act: Callable[[Sealing, int], None]) -> list[str]:
    """What each process raises, "" for nothing, where each does as `complete` does."""

    def process(own: int) -> str:
        one = Sealing(folder, number=number, process=own, processes=PROCESSES, store=store, limit_seconds=20)
        try:
            act(one, own)
        except Exception as error:
            one.give_up(error)
            return f"{type(error).__name__}: {error}"
        return ""

    with ThreadPoolExecutor(PROCESSES) as pool:
        return list(pool.map(process, range(PROCESSES)))


def together(one: Sealing, own: int) -> None:
    if own == 0:
        one.lead(may_write=lambda: None)
    else:
        one.follow()


def test_every_process_hashes_some_of_the_files_and_together_all(
    folder: epath.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[list[str]] = []
    measure = sealing.measure
    monkeypatch.setattr(
        sealing, "measure", lambda place, names: (shares.append(list(names)), measure(place, names))[1]
    )
    store = Store()
    assert seal(folder, store, 0, together) == ["", "", ""]
    assert sorted(len(share) for share in shares) == [2, 2, 3]
    assert len({name for share in shares for name in share}) == 7
    assert check_digests(folder) == []
    assert seal(folder, store, 1, together) == ["", "", ""]
    assert not any("/0/" in key for key in store.values)  # of the save before nothing is left


def test_what_one_cannot_read_is_told_to_all_and_nothing_is_sealed(folder: epath.Path) -> None:
    def act(one: Sealing, own: int) -> None:
        if own == 2:
            raise PermissionError("not for process 2")
        together(one, own)

    said = seal(folder, Store(), 0, act)
    assert said[2] == "PermissionError: not for process 2"
    assert said[0] == "RuntimeError: process 2: PermissionError: not for process 2"
    assert "not for process 2" in said[1] and said[1].startswith("RuntimeError")
    assert not (folder / "digests.json").exists()


def test_a_users_error_of_the_first_is_one_for_all(folder: epath.Path) -> None:
    def full() -> None:
        raise UserError("no room")

    def act(one: Sealing, own: int) -> None:
        if own == 0:
            one.lead(may_write=full)
        else:
            one.follow()

    said = seal(folder, Store(), 0, act)
    assert said[0] == "UserError: no room"
    assert said[1] == said[2] == "UserError: process 0: no room"
