"""One function on many items, in processes, with the results in the items' order."""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import queue
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from sealion_jax.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_map(
    make_function: Callable[..., Callable[[Item], Result]],
    arguments: tuple[Any, ...],
    items: Iterable[Item],
    *,
    workers: int,
) -> Iterator[tuple[Item, Result]]:
    """Each item with the result of `make_function(*arguments)` on it, in order, from `workers` processes.

    Each worker makes the function once. At most two items a worker are under way. With one worker everything
    happens in this process. Workers end with this process, however it ends.

    Raises:
        UserError: as the function raised it, when the item's turn comes. Other errors arrive as a
            RuntimeError with the worker's traceback, and so does the death of a worker.
    """
    if workers == 1:
        function = make_function(*arguments)
        yield from ((item, function(item)) for item in items)
        return
    with contextlib.ExitStack() as stack:
        free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for _ in range(workers):
            worker = _Worker(make_function, arguments)
            stack.callback(worker.close)
            free.put(worker)
        threads = ThreadPoolExecutor(workers)
        stack.callback(threads.shutdown, cancel_futures=True)
        under_way: collections.deque[tuple[Item, Future[Result]]] = collections.deque()
        for item in items:
            under_way.append((item, threads.submit(_ask_a_free_one, free, item)))
            if len(under_way) >= 2 * workers:
                first, result = under_way.popleft()
                yield first, result.result()
        for first, result in under_way:
            yield first, result.result()


def _ask_a_free_one(free: queue.SimpleQueue[_Worker], item: Any) -> Any:
    worker = free.get()
    try:
        return worker.ask(item)
    finally:
        free.put(worker)


class _Worker:
    """A process with one function, asked over a pipe. The pipe's end is what tells it to stop."""

    def __init__(
        self, make_function: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make_function, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, item: Any) -> Any:
        try:
            self._connection.send(item)
            result, error = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(10)
            raise RuntimeError(
                f"a worker process ended (exit code {self._process.exitcode}); -9 usually means that the "
                "machine ran out of memory: use fewer workers"
            ) from None
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        self._connection.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.terminate()


def _serve(
    connection: Connection, make_function: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]
) -> None:
    # Ctrl-C reaches the whole group; the parent decides what to do with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    function = make_function(*arguments)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            item = connection.recv()
            try:
                answer = (function(item), None)
            except UserError as error:
                answer = (None, UserError(*error.args))
            except Exception:
                answer = (None, RuntimeError(f"in a worker process:\n{traceback.format_exc()}"))
            connection.send(answer)
