"""The server of the search page over HTTP: what it answers, what it refuses, and that visitors do not meet."""

import base64
import contextlib
import json
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import small

pytest.importorskip("gradio", reason="the extra `app`")

import app_served
import httpx
from app_served import MAX_BYTES, Visitor

from finetune.app_guard import Guard, is_loopback
from finetune.app_page import SESSIONS
from shards.reader import ShardReader

SCRIPT = str(small.ROOT / "finetune/app.py")
SECRET = "the keys of the house"


def picture(data: bytes, name: str = "person.jpg") -> dict[str, str]:
    return {"name": name, "picture": base64.b64encode(data).decode()}


@pytest.fixture(scope="module")
def asked() -> list:
    """Addresses outside this machine that anything in this process connects to or looks up."""
    return []


@pytest.fixture(scope="module")
def servers() -> list:
    return []


@pytest.fixture(scope="module")
def served(tmp_path_factory, asked, servers):
    """Address of the page, its searcher, and the folder that gradio keeps files in."""
    base = tmp_path_factory.getbasetemp()
    folder = tmp_path_factory.mktemp("served")
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def connecting(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not is_loopback(address[0]):
            asked.append(address)
        return connect(self, address)

    def looking(host, *given, **more):
        if host and not is_loopback(host if isinstance(host, str) else host.decode()):
            asked.append(host)
        return look_up(host, *given, **more)

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("GRADIO_TEMP_DIR", str(folder / "gradio"))
        patched.setattr(socket.socket, "connect", connecting)
        patched.setattr(socket, "getaddrinfo", looking)
        searcher = app_served.people(folder, base)
        with app_served.running([searcher], servers) as url:
            yield url, searcher, folder / "gradio"


@pytest.fixture(scope="module")
def query(served, tmp_path_factory) -> bytes:
    data = small.drawn(tmp_path_factory.getbasetemp(), small.LABELLED)
    return ShardReader([data], "query")[3].image


def ids(html: str) -> list[int]:
    return [int(number) for number in re.findall(r'data-id="(\d+)"', html)]


def test_the_page_loads_from_here_alone(served):
    url, _, _ = served
    answer = httpx.get(url)
    assert answer.status_code == 200
    config = httpx.get(f"{url}/config").json()
    assert config["title"] == "Search people"
    assert config["analytics_enabled"] is False
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"(?:https?:)?//", answer.text)
    assert not re.findall(r"@import|fonts\.g", httpx.get(f"{url}/theme.css").text)
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert [answer.headers[name] for name in ("cache-control", "x-frame-options")] == ["no-store", "DENY"]


def test_a_picture_finds_what_the_gallery_finds(served, query):
    url, searcher, folder = served
    visitor = Visitor(url, "finder")
    found = visitor.ask("sent", picture(query))
    best = searcher.loaded().gallery.search(searcher.extractor([query]), 12)[0]
    assert ids(found["result"]) == [answer.id for answer in best]
    assert f"cosine {best[0].score:.3f}"[:12] in found["result"]
    assert found["message"] == '<div class="message" role="alert"></div>'
    assert not list(folder.rglob("*")), "what is uploaded is never a file"
    text = re.search(r'href="data:application/json;charset=utf-8;base64,([^"]+)"', found["result"])[1]
    told = json.loads(base64.b64decode(text))
    assert [row["id"] for row in told["answers"]] == ids(found["result"])
    assert str(searcher.folder.parent) not in found["result"] + json.dumps(told), "no path of this machine"


def test_a_click_makes_the_image_the_query_and_back_returns(served, query):
    visitor = Visitor(served[0], "clicker")
    first = ids(visitor.ask("sent", picture(query))["result"])
    second = visitor.ask("picked", {"id": first[0]})["result"]
    assert first[0] not in ids(second), "the query itself is left out"
    assert "Back to the query before" in second
    assert ids(visitor.ask("back", {})["result"]) == first
    assert "Images of the gallery" in visitor.ask("browse", {"text": "", "page": 0})["result"]


def test_visitors_do_not_meet(served, query):
    one, other = Visitor(served[0], "one"), Visitor(served[0], "other")
    one.ask("sent", picture(query, "mine.jpg"))
    assert "Images of the gallery" in other.ask("input", controls=[24, [], []])["result"], "it has no query"
    mine = one.ask("input", controls=[24, [], []])["result"]
    assert "mine.jpg" in mine
    assert len(ids(mine)) == 24


def test_gradio_keeps_sessions_where_they_are_forgotten(served, servers, query):
    Visitor(served[0], "kept").ask("sent", picture(query))
    holder = servers[0].config.app.inner.routes[-1].app.state_holder
    assert "kept" in holder.session_data
    assert "kept" in holder.time_last_used
    assert holder.session_data["kept"].is_closed is False
    assert holder.capacity == SESSIONS


@pytest.mark.parametrize(
    "event, data, sentence",
    [
        ("sent", picture(b"no image", "a.jpg"), "a.jpg is not a JPEG, PNG, WebP or BMP image"),
        ("sent", picture(b"", "a.jpg"), "a.jpg is empty"),
        ("sent", picture(bytes(MAX_BYTES + 1), "a.jpg"), "a.jpg has 300 kB; at most 300 kB are taken"),
        ("sent", {"name": "a.jpg", "size": 99_000_000}, "a.jpg has 99 MB"),
        ("sent", {"name": "a.jpg", "picture": "%%%"}, "a.jpg did not arrive whole"),
        ("sent", {"name": 7, "picture": 8}, "nothing of your image arrived"),
        ("sent", None, "nothing of your image arrived"),
        ("sent", picture(b"x", "../../<b>a</b>.jpg"), "b&gt;.jpg is not a JPEG"),
        ("picked", {"id": 1 << 40}, "This image is not in the gallery any more"),
        ("picked", {"id": -1}, "the id of an image must be a number"),
        ("picked", {"id": "../../etc/passwd"}, "the id of an image must be a number"),
        ("picked", {"id": True}, "the id of an image must be a number"),
        ("picked", None, "the id of an image must be a number"),
    ],
)
def test_what_is_no_query_is_answered_with_a_sentence(served, event, data, sentence):
    found = Visitor(served[0], "bad").ask(event, data)
    assert found["success"]
    assert sentence in found["message"]
    assert found["result"]["__type__"] == "update"
    assert "value" not in found["result"], "what was shown stays"


@pytest.mark.parametrize("controls", [[10**6, [], []], ["12; drop", [], []], [12, [99], []], [12, [], ["sudo"]]])
def test_settings_that_are_no_choices_are_refused(served, query, controls):
    visitor = Visitor(served[0], "settings")
    visitor.ask("sent", picture(query))
    assert not visitor.ask("input", controls=controls)["success"]
    assert visitor.ask("input")["success"], "the page lives"


def test_a_file_in_the_place_of_a_setting_is_neither_copied_nor_fetched(served, secret, asked):
    url, _, folder = served
    visitor = Visitor(url, "files")
    good = {"data": [None, 12, [], []], "fn_index": 0, "session_hash": "files", "event_data": None}
    for path in (str(secret), "http://192.0.2.1/x.jpg"):
        file = {"path": path, "url": path, "meta": {"_type": "gradio.FileData"}}
        bodies = [good | {"data": data} for data in ([None, 12, [file], []], [file], [None, 12, [[file]], []], file)]
        bodies += [good | {"event_data": data} for data in (file, {"picture": file}, [file])]
        for body in (*bodies, [file], file):
            assert visitor.client.post("/gradio_api/queue/join", json=body).status_code == 400
    assert not list(folder.rglob("*"))
    assert not asked


@pytest.fixture(scope="module")
def secret(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("secrets") / "secret.txt"
    path.write_text(SECRET)
    return path


def test_no_file_of_the_machine_and_no_other_host_can_be_read(served, secret):
    url, searcher, _ = served
    ups = "../" * 12
    encoded = ups.replace("/", "%2f").replace("..", "%2e%2e")
    gallery = searcher.folder / "gallery.json"
    paths = [f"/gradio_api/file={path}" for path in (secret, f"{ups}{secret}", gallery, f"{url}/config")]
    paths += [f"/gradio_api/file/{secret}", f"/file={secret}", f"/file/{secret}", f"/gradio_api/proxy={url}/config"]
    for root in ("/assets/", "/static/", "/gradio_api/custom_component/x/client/t/"):
        paths += [f"{root}{ups}{secret}", f"{root}{encoded}{str(secret).replace('/', '%2f')}", f"{root}..%5c..%5cx"]
    paths += ["/docs", "/openapi.json", "/redoc", "/monitoring", "/monitoring/summary", "/gradio_api/deep_link"]
    paths += ["/gradio_api/runs", "/gradio_api/run-history/buckets", "/gradio_api/stream/a/b/1/playlist-file", "/login"]
    host, port = url.removeprefix("http://").split(":")
    for path in paths:
        with socket.create_connection((host, int(port)), timeout=10) as raw:  # no client that tidies the path
            raw.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
            answer = b"".join(iter(lambda raw=raw: raw.recv(65536), b""))
        assert answer.startswith((b"HTTP/1.1 404", b"HTTP/1.1 400")), (path, answer[:200])
        assert SECRET.encode() not in answer
    for path in ("upload", "component_server", "process_recording", "run/predict", "call/sent", "run-history/connect"):
        answer = httpx.post(f"{url}/gradio_api/{path}", files={"files": ("a.jpg", b"x")})
        assert answer.status_code == 404, path
    assert httpx.put(url).status_code == httpx.delete(f"{url}/config").status_code == 404


def test_strangers_requests_are_refused(served):
    url, _, folder = served
    assert httpx.get(url, headers={"Host": "evil.example"}).status_code == 403
    assert httpx.get(url, headers={"Host": "localhost:80"}).status_code == 200
    join = f"{url}/gradio_api/queue/join"
    assert httpx.post(join, json={}, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert httpx.post(join, content=bytes(MAX_BYTES * 2)).status_code == 413
    assert httpx.post(join, content=iter([b"x"])).status_code == 411, "of no told length"
    assert not list(folder.rglob("*"))


def test_nobody_else_was_asked(served, asked):
    assert not asked


@pytest.mark.parametrize(
    "host, only_here",
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("10.0.0.7", False)],
)
def test_another_host_is_told_from_this_machine(host, only_here):
    assert is_loopback(host) is only_here
    scope = {"method": "GET", "path": "/", "headers": [(b"host", b"box.example:7860")]}
    assert (Guard(None, 1, only_here).refused(scope) is not None) is only_here


def test_wrong_use_is_told(served, tmp_path, capsys):
    _, searcher, _ = served
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for given, told in [
            ((searcher.folder, "--port", port), "Address already in use); if another program is there, give another"),
            ((tmp_path / "none", "--port", 0), "none does not exist"),
            ((searcher.folder, "--port", 70000), "expected 0 to 65535"),
            ((searcher.folder, "--max-upload-mb", 0), "expected more than 0"),
            ((searcher.folder, "--ckpt", "a", "b"), "names 2 models for 1 galleries"),
            ((searcher.folder, "--port", 0, "--ckpt", tmp_path / "gone"), "is no checkpoint"),
        ]:
            assert small.run([SCRIPT, *map(str, given)]) == 2, given
            assert told in capsys.readouterr().err


def test_without_gradio_the_way_to_get_it_is_told(served, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "finetune.app_page")
    monkeypatch.delitem(sys.modules, "finetune.app_server")
    assert small.run([SCRIPT, str(served[1].folder)]) == 2
    assert "the search page needs gradio: pip install -e '.[app]'" in capsys.readouterr().err


def test_from_the_command_line_to_ctrl_c(served, capsys):
    port, codes = small.free_port(), []
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs that ignore it

    def visit_and_interrupt():
        try:
            for _ in range(3000):
                with contextlib.suppress(httpx.TransportError):
                    codes.append(httpx.get(f"http://127.0.0.1:{port}").status_code)
                    break
                time.sleep(0.01)
        finally:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=visit_and_interrupt)
    thread.start()
    status = small.run([SCRIPT, str(served[1].folder), "--port", port, "--host", "0.0.0.0", "--device", "cpu"])
    thread.join()
    said = capsys.readouterr()
    assert [status, codes] == [130, [200]]
    assert said.out == f"http://0.0.0.0:{port}  (Ctrl-C ends it)\n"
    assert said.err.startswith("warning: --host 0.0.0.0 shows the images of people in these galleries to everybody")
    assert said.err.endswith("interrupted\n")
    assert "Traceback" not in said.err
