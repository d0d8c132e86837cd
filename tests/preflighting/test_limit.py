"""A process that answers no more, fails or hangs during preflight is named, and all end: in threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping

import pytest

from sealion_jax.errors import UserError
from sealion_jax.preflighting import limit as limit_module
from sealion_jax.preflighting.limit import Limit

HOSTS = ["a", "b", "c"]


class Board:
    """What JAX's service is in a run; `cut_off` has calls hang, as they do when process 0 is stopped."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.lock = threading.Lock()
        self.cut_off = threading.Event()

    def tell(self, key: str, text: str, *, is_last_word: bool = False) -> None:
        self._hang()
        with self.lock:
            if not (is_last_word and key in self.texts):
                self.texts[key] = text

    def told(self) -> Mapping[str, str]:
        self._hang()
        with self.lock:
            return dict(self.texts)

    def _hang(self) -> None:
        while self.cut_off.is_set():
            time.sleep(0.01)


class Node:
    """A process under a limit, that notes how it was ended."""

    def __init__(self, process: int, board: Board | None, *, limit: float = 60.0, hosts=HOSTS) -> None:
        self.said: list[str] = []
        self.blamed: list[str] = []
        self.codes: list[int] = []
        self.ended = threading.Event()
        self.limit = Limit(
            hosts,
            process=process,
            limit_seconds=limit,
            silent_seconds=1.0,
            store=board,
            blame=self.blamed.extend,
            report=self.said.append,
            end=self._end,
        )

    def _end(self, code: int) -> None:
        self.codes.append(code)
        self.ended.set()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(limit_module, "_LOOK_SECONDS", 0.02)


@pytest.fixture
def board():
    board = Board()
    yield board
    board.cut_off.clear()


def enter(*nodes: Node) -> None:
    for node in nodes:
        node.limit.__enter__()


def leave(*nodes: Node) -> None:
    for node in nodes:
        node.limit.__exit__(None, None, None)


def test_those_that_live_and_get_on_are_left_alone(board):
    nodes = [Node(n, board) for n in range(3)]
    enter(*nodes)
    with nodes[0].limit.doing("matrix products"):
        time.sleep(1.5)
    leave(*nodes)
    assert not any(node.codes for node in nodes)


def test_one_that_was_stopped_is_named_with_its_node_and_left_for_the_scheduler(board):
    nodes = [Node(n, board) for n in range(2)]
    enter(*nodes)  # the third one never says anything
    assert all(node.ended.wait(10) for node in nodes)
    assert {tuple(node.said) for node in nodes} == {
        ("error: no sign of life for 1 s from process 2 on c: stopped, killed, or cut off",)
    }
    assert [node.codes for node in nodes] == [[1], [1]]
    assert [node.blamed for node in nodes] == [["c"], []]


def test_where_process_0_is_stopped_its_service_hangs_with_it(board):
    first, *nodes = [Node(n, board) for n in range(3)]
    enter(first, *nodes)
    time.sleep(0.3)
    board.cut_off.set()
    leave(first)
    assert all(node.ended.wait(10) for node in nodes)
    assert all("from process 0 on a: stopped" in node.said[0] for node in nodes)
    assert [node.blamed for node in nodes] == [["a"], []]


def test_a_device_that_hangs_is_named_not_those_that_wait_for_it(board):
    nodes = [Node(n, board, limit=0.5) for n in range(3)]
    enter(*nodes)
    with (
        nodes[0].limit.doing("waiting for each other", together=True),
        nodes[1].limit.doing("matrix products"),
        nodes[2].limit.doing("waiting for each other", together=True),
    ):
        assert all(node.ended.wait(10) for node in nodes)
    assert {node.said[0].partition(":")[2].partition(":")[0] for node in nodes} == {
        " process 1 on b needs more than 0 s for matrix products"
    }
    assert nodes[0].blamed == ["b"]


def test_what_all_hang_in_is_told_and_nobody_blamed(board):
    nodes = [Node(n, board, limit=0.2) for n in range(3)]
    enter(*nodes)
    for node in nodes:
        node.limit.doing("the all-reduce", together=True).__enter__()
    assert all(node.ended.wait(10) for node in nodes)
    assert all("the all-reduce: what hangs is not known" in node.said[0] for node in nodes)
    assert not any(node.blamed for node in nodes)


def test_one_that_fails_says_so_and_the_others_end_with_it(board, capsys):
    nodes = [Node(n, board) for n in range(3)]
    enter(*nodes)
    error = RuntimeError("ECC")
    with pytest.raises(RuntimeError, match="ECC"), nodes[2].limit.doing("matrix products"):
        raise error
    nodes[2].limit.__exit__(RuntimeError, error, None)
    assert all(node.ended.wait(10) for node in nodes)
    assert all(node.said[0] == "error: process 2 on c failed: RuntimeError: ECC" for node in nodes)
    assert nodes[0].blamed == ["c"]
    assert "RuntimeError: ECC" in capsys.readouterr().err


def test_one_that_fails_because_another_is_gone_does_not_take_the_blame(board, capsys):
    nodes = [Node(n, board) for n in range(2)]
    enter(*nodes)
    nodes[1].limit.doing("waiting for each other", together=True).__enter__()
    nodes[1].limit.__exit__(ValueError, ValueError("Connection closed by peer"), None)
    assert all(node.ended.wait(10) for node in nodes)
    assert all("from process 2 on c" in node.said[0] for node in nodes)
    assert nodes[0].blamed == ["c"]
    assert "closed by peer" in capsys.readouterr().err


def test_the_users_mistakes_are_left_to_the_command(board):
    node = Node(0, board)
    enter(node)
    node.limit.__exit__(UserError, UserError("no"), None)
    assert not node.codes


def test_one_alone_has_a_limit_too():
    node = Node(0, None, limit=0.2, hosts=["a"])
    enter(node)
    with node.limit.doing("matrix products"):
        assert node.ended.wait(10)
    assert node.codes == [1]
    assert node.blamed == ["a"]
    assert "process 0 on a needs more than 0 s for matrix products" in node.said[0]
