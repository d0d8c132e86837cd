"""A Google Cloud Storage server for tests: gcp-storage-emulator behind doors that can be told to misbehave.

`python -m tests.storage.gcs_server BUCKET` prints a line of JSON with the port of its clean door and serves
until its standard input ends: it never outlives whoever started it. Objects are kept in memory.

Added to the emulator are what our code relies on and it lacks: generations as conditions (creating an object
that nobody else may create) and in answers, several requests at a time on connections that stay open, and
requests that are read whole before they count, so that a client that is killed or stopped in the midst of
one holds up nobody.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import random
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from gcp_storage_emulator import server as emulator
from gcp_storage_emulator.handlers.buckets import create_bucket
from gcp_storage_emulator.storage import Storage

CONTROL = "/_control/"
WRITES = ("POST", "PUT", "PATCH", "DELETE")


class PreconditionFailedError(Exception):
    """The object has another generation than the request names."""


class MemoryStorage(Storage):
    """The emulator's storage, which honours `ifGenerationMatch` and writes no index at each change."""

    expected_generation: str | None = None
    """Of the request that is being handled."""
    written: str | None = None
    """The object that the request has written."""

    def __init__(self, bucket: str) -> None:
        super().__init__(use_memory_fs=True, data_dir="/memory")
        create_bucket(bucket, self)
        self.buckets[bucket]["softDeletePolicy"] = {"retentionDurationSeconds": "0"}
        self.finished: dict[str, dict] = {}
        """What uploads in several requests have made: asked again, Google's server says so again."""

    def create_file(
        self, bucket_name: str, file_name: str, content: bytes, file_obj: dict, file_id: str | None = None
    ) -> None:
        if self.expected_generation is not None:
            there = self.objects.get(bucket_name, {}).get(file_name)
            if self.expected_generation != ("0" if there is None else there["generation"]):
                raise PreconditionFailedError(file_name)
        super().create_file(bucket_name, file_name, content, file_obj, file_id)
        self.written = file_name
        if file_id is not None:
            self.finished[file_id] = file_obj

    def _write_config_to_file(self) -> None:
        pass


class Door(ThreadingHTTPServer):
    """A port that serves the storage, with faults; it remembers its requests."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, storage: MemoryStorage, lock: threading.Lock, faults: dict[str, Any]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.storage, self.storage_lock = storage, lock
        self.faults = faults
        self.random = random.Random(faults.get("seed", 0))
        self.requests: list[list[Any]] = []
        self.doors: dict[int, Door] = {}
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def port(self) -> int:
        return self.server_address[1]

    def chosen_fault(self, method: str) -> str | None:
        """What befalls the next request: a name of `Faults`' fields, or nothing."""
        with self.storage_lock:
            if method in WRITES and self.faults.get("first_writes"):
                return self.faults["first_writes"].pop(0) or None
            draw = self.random.random()
            for name in ("refuse", "reset", "lose_answer", "delay"):
                draw -= self.faults.get(name, 0.0)
                if draw < 0:
                    return name
        return None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away in the midst of a request is nothing to tell."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Door
    timeout = 300
    _generation: str | None = None
    """Of the object whose content is being answered with."""

    def log_message(self, format: str, *args: object) -> None:
        pass

    @property
    def storage(self) -> MemoryStorage:
        return self.server.storage

    def _handle(self) -> None:
        body = emulator._read_raw_data(self) or b""
        if self.path.startswith(CONTROL):
            self._control(body)
            return
        fault = self.server.chosen_fault(self.command)
        told: list[Any] = [self.command, self.path, 0, fault, None]
        self._told = told
        self.server.requests.append(told)  # before the client can know how it ended
        told[2] = self._with_fault(fault, body)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _handle  # noqa: N815 (the library's names)

    def _with_fault(self, fault: str | None, body: bytes) -> int:
        faults = self.server.faults
        if faults.get("no_account"):
            return self._answer(
                HTTPStatus.UNAUTHORIZED,
                "Anonymous caller does not have storage.objects.create access to the object.",
            )
        if faults.get("read_only") and self.command in WRITES:
            return self._answer(HTTPStatus.FORBIDDEN, "the account may not write to this bucket")
        if fault == "delay":
            time.sleep(faults["delay_seconds"])
        if fault == "refuse":
            return self._answer(self.server.random.choice((503, 429, 500)), "try again later")
        if fault == "reset":
            return self._reset()
        answer = self._emulated(body)
        if fault == "lose_answer":
            return self._reset()
        self.wfile.write(answer)
        return int(answer.split(b" ", 2)[1])

    def _emulated(self, body: bytes) -> bytes:
        """The emulator's answer."""
        parts = urlsplit(self.path)
        query = parse_qs(parts.query)
        del self.headers["Transfer-Encoding"], self.headers["Content-Length"]
        self.headers["Content-Length"] = str(len(body))
        with self.server.storage_lock, self._streams(io.BytesIO(body), io.BytesIO()) as written:
            self.storage.expected_generation = query.get("ifGenerationMatch", [None])[0]
            self._generation = self._generation_of(parts.path)
            try:
                made = self.storage.finished.get(query.get("upload_id", [""])[0])
                if self._generation in query.get("ifGenerationNotMatch", []):
                    self._answer(HTTPStatus.NOT_MODIFIED, "")
                elif made is not None:
                    self._send(HTTPStatus.OK, json.dumps(made).encode())
                else:
                    emulator.Router(self).handle(self.command)
            except PreconditionFailedError as error:
                self._answer(HTTPStatus.PRECONDITION_FAILED, f"{error} has another generation")
            except Exception as error:
                self._answer(HTTPStatus.BAD_REQUEST, f"the emulator failed: {error!r}")
            finally:
                self._told[4] = self.storage.written
                self.storage.expected_generation = self.storage.written = self._generation = None
            return written.getvalue()

    def _generation_of(self, path: str) -> str | None:
        """The generation of the object that a request names in its path; None if there is none."""
        named = re.search(r"/b/([^/]+)/o/([^/]+)$", path)
        if named is None:
            return None
        bucket, name = (unquote(part) for part in named.groups())
        return self.storage.objects.get(bucket, {}).get(name, {}).get("generation")

    def end_headers(self) -> None:
        if self._generation is not None:
            self.send_header("x-goog-generation", self._generation)
        super().end_headers()

    @contextlib.contextmanager
    def _streams(self, rfile: io.BytesIO, wfile: io.BytesIO) -> Iterator[io.BytesIO]:
        before = self.rfile, self.wfile
        self.rfile, self.wfile = rfile, wfile
        try:
            yield wfile
        finally:
            self.rfile, self.wfile = before

    def _answer(self, status: int, message: str) -> int:
        content = json.dumps({"error": {"code": int(status), "message": message}}).encode()
        return self._send(status, b"" if status == HTTPStatus.NOT_MODIFIED else content)

    def _send(self, status: int, content: bytes) -> int:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        return int(status)

    def _reset(self) -> int:
        """Breaks the connection so that the client sees ECONNRESET; as a status, 0."""
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            # socketserver shuts a connection down in peace before it closes it, which would send no reset.
            socket.close(self.connection.detach())
        self.close_connection = True
        self.wfile = io.BytesIO()
        return 0

    def _control(self, body: bytes) -> None:
        """Requests of those who run the server: another door, what a door was asked, an end to it."""
        actions: dict[str, Callable[[Any], Any]] = {
            "open": self._open,
            "requests": lambda port: self.server.doors[port].requests,
            "close": lambda port: self.server.doors.pop(port).shutdown(),
        }
        answer = actions[self.path.removeprefix(CONTROL)](json.loads(body))
        self._send(HTTPStatus.OK, json.dumps(answer).encode())

    def _open(self, faults: dict[str, Any]) -> int:
        door = Door(self.storage, self.server.storage_lock, faults)
        self.server.doors[door.port] = door
        return door.port


def main(bucket: str) -> None:
    """Serves until standard input ends."""
    logging.disable(logging.CRITICAL)
    door = Door(MemoryStorage(bucket), threading.Lock(), {})
    print(json.dumps({"port": door.port}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
