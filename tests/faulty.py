"""A web server on the loopback that misbehaves as the test says."""

import contextlib
import random
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

FAULTS = ("500", "reset", "short", "cut", "flip")  # and "stall"


class Request(NamedTuple):
    """What was asked for and what was done: start, end = the bytes asked for, end not among them."""

    path: str
    start: int
    end: int
    fault: str | None
    sent: int  # bytes of the body


class Server(ThreadingHTTPServer):
    """Serves `files`. fault(path, number of the request) names what goes wrong with it, None for nothing.

    "500", "403" ...: this status; "reset": the connection breaks inside the body; "short": it closes there; "cut": the
    server says that half of the body were all; "flip": one bit is wrong; "stall": nothing comes until the server ends.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, files: dict[str, bytes], ranges: bool = True):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.ranges = files, ranges
        self.fault: Callable[[str, int], str | None] = lambda path, number: None
        self.delay_s = 0.0  # before each answer
        self.requests: list[Request] = []
        self.lock, self.ended, self.count = threading.Lock(), threading.Event(), 0

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{path}"

    @property
    def sent(self) -> int:
        """Bytes of all bodies."""
        return sum(request.sent for request in self.requests)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is no news."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes, which would cost 40 ms
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0].lstrip("/")
        with self.server.lock:
            fault = self.server.fault(path, self.server.count)
            self.server.count += 1
        self.server.ended.wait(3600 if fault == "stall" else self.server.delay_s)
        data = self.server.files.get(path)
        if data is None:
            fault = "404"
        start, end, status = 0, len(data or b""), 200
        if (
            data is not None
            and self.server.ranges
            and (match := re.match(r"bytes=(\d+)-(\d+)", self.headers["Range"] or ""))
        ):
            start, end, status = int(match[1]), min(int(match[2]) + 1, len(data)), 206
            if start >= len(data):
                fault = "416"
        body = (data or b"")[start:end]
        if fault and fault.isdigit():
            status, body = int(fault), b"no"
        elif fault == "cut":
            body = body[: len(body) // 2]
        elif fault == "flip" and body:
            body = bytes([body[0] ^ 1]) + body[1:]
        broken = fault in ("reset", "short", "stall")
        length, body = len(body), body[: len(body) // 2] if broken else body
        with self.server.lock:
            self.server.requests.append(Request(path, start, end, fault, len(body) * with_body))
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if with_body:
            self.wfile.write(body)
        if broken:
            self.close_connection = True
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


def seeded(seed: int, rate: float = 0.3, kinds: tuple[str, ...] = FAULTS) -> Callable[[str, int], str | None]:
    """Faults by chance, the same for the same seed and order of requests."""
    chance = random.Random(seed)
    return lambda path, number: chance.choice(kinds) if chance.random() < rate else None


@contextlib.contextmanager
def serving(files: dict[str, bytes], ranges: bool = True) -> Iterator[Server]:
    """A server with these files, until the block ends."""
    server = Server(files, ranges)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()


def noise(number: int, size: int) -> bytes:
    """Bytes that are other ones for each number."""
    return random.Random(number).randbytes(size)
