"""The search page on drawn people: galleries with a tiny model, and its server in a thread of the test."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import small
from test_search import CALIBRATION, a_model, a_reader_of_text

from finetune.app_search import Searcher
from finetune.extractor import Extractor
from finetune.gallery import Gallery
from finetune.gallery_sources import open_source

MAX_BYTES = 300_000  # of an upload
SECONDS = 30.0


def searcher(folder: Path, source: Path | str, name: str = "people", model: Extractor | None = None, **how) -> Searcher:
    """A new gallery of a source with a calibrated model."""
    model = model or Extractor(a_model(folder / f"model-{name}", 0, calibration=CALIBRATION), "cpu")
    splits = ["gallery"] if (Path(source) / "manifest.json").exists() else None
    gallery = Gallery.build(folder / name, model, [open_source(str(source), splits)], told=lambda _: None, **how)
    return Searcher(gallery, model)


def sentences(folder: Path) -> Searcher:
    """Six crops, and a model that knows the words of "a woman in a red coat"."""
    made = a_reader_of_text(folder)
    return Searcher(Gallery.load(made / "gallery"), Extractor(made, "cpu"))


def people(folder: Path, base: Path) -> Searcher:
    """48 drawn images of 12 people and two cameras, with labels. base: where drawn sets are shared."""
    return searcher(folder, small.drawn(base, small.LABELLED))


@contextlib.contextmanager
def running(searchers: Sequence[Searcher], servers: list | None = None) -> Iterator[str]:
    """The address of the page. servers: takes the server."""
    from finetune import app_server

    told = []
    with app_server.listening("127.0.0.1", 0) as sock:
        page = app_server.Page(searchers, MAX_BYTES, attention=False)
        server = app_server.Server(page, "127.0.0.1", sock.getsockname()[1], told.append)
        if servers is not None:
            servers.append(server)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        end = time.monotonic() + SECONDS
        while not told:
            assert thread.is_alive(), "the server ended"
            assert time.monotonic() < end, "the server does not begin"
            time.sleep(0.01)
        try:
            yield told[0].split()[0]
        finally:
            server.should_exit = True
            thread.join(SECONDS)


class Visitor:
    """A browser's requests, without a browser: joins the queue as gradio's page does, and reads the answer."""

    def __init__(self, url: str, session: str):
        self.client, self.session = httpx.Client(base_url=url, timeout=SECONDS), session
        self.config = self.client.get("/config").json()
        self.controls: list[Any] = [12, [], []]  # matches, cameras, options

    def ask(
        self, event: str, data: Any = None, controls: list[Any] | None = None, given: Sequence[Any] = ()
    ) -> dict[str, Any]:
        """What an event gives: `success`, and of its outputs message and result as HTML. given: what the event has
        before the controls. The session is the server's: None in its place."""
        (wanted,) = [one for one in self.config["dependencies"] if one["targets"][0][1] == event][:1]
        given = [None, *given, *(self.controls if controls is None else controls)]
        body = {"data": given, "event_data": data, "fn_index": wanted["id"], "session_hash": self.session,
                "trigger_id": wanted["targets"][0][0]}  # fmt: skip
        joined = self.client.post("/gradio_api/queue/join", json=body)
        assert joined.status_code == 200, joined.text
        with self.client.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.session}) as stream:
            for line in stream.iter_lines():
                told = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                if told.get("msg") == "process_completed":
                    outputs = told["output"].get("data") or [None] * 3
                    return {"success": told["success"], "message": outputs[1], "result": outputs[2], "whole": told}
        raise AssertionError("no answer")
