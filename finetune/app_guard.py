"""What the server of the search page answers at all: a list of addresses; everything else is refused before gradio.

Gradio has addresses that read files of this machine, fetch pages of other hosts, take uploads to disk, tell the code of
the page, or record a session. This page needs none of them, so none is open.
"""

import ipaddress
import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

NAME = r"[\w.@~-]+"  # of a file, no folder
READ = re.compile(  # asked for with GET
    rf"/|/config|/favicon\.ico|/theme\.css|/(?:assets|static)/(?:{NAME}/)*{NAME}"
    r"|/gradio_api/(?:queue/data|heartbeat/\w+)"
)
SENT = re.compile(r"/gradio_api/queue/join/?")  # asked for with POST: an event of the page
SLACK = 100_000  # bytes of a message beside its picture
LOCAL = {"localhost", "127.0.0.1", "[::1]"}
HEADERS = (
    # inline and eval: how gradio's own page is built. Nothing comes from, and nothing goes to, another host
    (b"content-security-policy", b"default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
     b"style-src 'self' 'unsafe-inline'; frame-ancestors 'none'; form-action 'none'; base-uri 'self'"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)  # fmt: skip


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """An ASGI application before another one."""

    def __init__(self, inner: Callable, picture: int, loopback: bool):
        """picture: bytes, the largest that is taken. loopback: the server is for this machine only; then a request by
        another name than its own is refused, which a page on the net could send after it let its name point here."""
        self.inner, self.loopback = inner, loopback
        self.limit = picture * 4 // 3 + SLACK  # base64

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.inner(scope, receive, send)
            return
        if scope["type"] != "http":  # a web socket; the page has none
            await send({"type": "websocket.close", "code": 1008})
            return
        refused = self.refused(scope)
        if refused:
            await _answer(send, *refused)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *HEADERS, *_fresh(scope["path"])]
            await send(message)

        if scope["method"] == "POST":
            body = await _whole(receive)
            if not is_event(body):
                await _answer(send, 400, "this is no event of the page")
                return
            receive = _again(body, receive)
        await self.inner(scope, receive, guarded)

    def refused(self, scope: Message) -> tuple[int, str] | None:
        """Status and sentence of a request that is not answered; None: it is."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        name = re.sub(r":\d+$", "", headers.get("host", ""))
        if self.loopback and name not in LOCAL:
            return 403, "this page is for the machine that it runs on: ask for 127.0.0.1 or localhost"
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and scope["path"] != "/":
            return 403, "another page may not ask this one"
        wanted = READ if scope["method"] in ("GET", "HEAD") else SENT if scope["method"] == "POST" else None
        # the raw path: what is encoded (%2e, %2f) is none of ours
        raw = scope.get("raw_path") or scope["path"].encode()
        if wanted is None or not wanted.fullmatch(raw.decode("latin-1")) or ".." in scope["path"]:
            return 404, "there is nothing here"
        # what comes in pieces of no told length (chunked) could be endless; the server reads no more than is told
        length = headers.get("content-length", "" if wanted is SENT or "transfer-encoding" in headers else "0")
        if not length.isdecimal():
            return 411, "say how long the message is"
        return (413, "the message is too large") if int(length) > self.limit else None


def is_event(body: bytes) -> bool:
    """Whether a message has the form of this page's events: controls hold numbers, words and lists of them, what
    comes with the event is words and numbers by name.

    Gradio takes any mapping with a path or an address for a file, and copies or fetches it.
    """
    try:
        told = json.loads(body)
    except (ValueError, RecursionError):
        return False
    if not isinstance(told, dict) or not isinstance(told.get("data"), list):
        return False
    with_it = told.get("event_data")
    if isinstance(with_it, dict):
        if with_it.keys() & {"path", "url", "meta"}:
            return False
        with_it = list(with_it.values())
    inside = [each for one in (*told["data"], with_it) for each in (one if isinstance(one, list) else [one])]
    return all(each is None or isinstance(each, str | int | float) for each in inside)


async def _whole(receive: Receive) -> bytes:
    """The body of a request, no longer than it told."""
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that was read already, then what comes after it."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return waiting.pop() if waiting else await receive()

    return replayed


def _fresh(path: str) -> list[tuple[bytes, bytes]]:
    """Answers with pictures of people are not to be kept by a browser; the parts of the page are."""
    return [] if path.startswith("/assets/") else [(b"cache-control", b"no-store")]


async def _answer(send: Send, status: int, sentence: str) -> None:
    body = sentence.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode()), *HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
