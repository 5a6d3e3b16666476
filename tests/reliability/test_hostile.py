"""R17: recipes, shard sets, keep-lists and tables that want to run programs, read other files or take all memory."""

import json
import os
import pickle
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fuzzing import npy, npy_claiming
from hostile import DEEP, examine, hole, put, survey, trapped

from recipes.load import Section, load
from shards import index
from shards.manifests import read_manifest
from shards.reader import ShardReader

pytestmark = pytest.mark.row("R17")


class Some(Section):
    """A recipe."""

    seed: int = 0
    names: tuple[str, ...] = ()
    free: dict[str, object] | None = None


def test_the_watch_sees_what_it_should(tmp_path):
    """Without it the tests below would show nothing."""
    pickled = put(tmp_path / "a.pkl", trapped(tmp_path / "sign"))
    run, wrote, large, died, crashed, fine = examine(
        lambda: pickle.loads(pickled.read_bytes()),
        lambda: (tmp_path / "b").write_text("x"),
        lambda: np.ones(600 << 17),
        lambda: os.kill(os.getpid(), 11),
        lambda: {}["x"],
        lambda: None,
    )
    assert [deed.split()[0] for deed in run.deeds] == ["os.system"]
    assert (tmp_path / "sign").exists(), "the trap is a real one"
    assert [deed.split()[0] for deed in wrote.deeds] == ["open"]
    assert 590 < large.megabytes < 650
    assert died.outcome == "died of signal 11"
    assert crashed.outcome == "crash, KeyError"
    assert fine.faults("read") == []


def recipe_files(sign: Path) -> dict[str, bytes | str]:
    laughs = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    merges = "a0: &a0 {x: 1}\n" + "".join(
        f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 9)
    )
    return {
        "calls a program": f"free: {{a: !!python/object/apply:os.system ['touch {sign}']}}",
        "new object": f"free: !!python/object/new:subprocess.Popen [['touch', '{sign}']]",
        "names a function": "free: !!python/name:os.system",
        "imports": "free: !!python/module:antigravity",
        "billion laughs": laughs,
        "billion merges": merges,
        "a list in itself": "names: &a [*a]",
        "deep": f"free: {DEEP}",
        "deep sections": "a: " * 50_000,
        "a huge number": "seed: " + "9" * 400_000,
        "a huge hexadecimal number": "seed: 0x" + "f" * 400_000,
        "hexadecimal text": "names: 0x" + "f" * 400_000,
        "base 60": "seed: " + "59:" * 150_000 + "59",
        "not UTF-8": "seed: 1 # \u00e9".encode("latin-1"),
        "UTF-16": "seed: 1".encode("utf-16"),
        "zeros": bytes(1000),
        "a long wrong value": "names: {" + "x: {}," * 10_000 + "}",
        "a long key": "x" * 400_000 + ": 1",
        "a tag on an integer": "seed: !!int abc",
        "binary": "names: !!binary AAAA",
    }


def test_recipes(tmp_path, figures):
    sign, sound = tmp_path / "sign", put(tmp_path / "sound.yaml", "seed: 1")
    cases = {}
    for name, data in recipe_files(sign).items():
        path = put(tmp_path / f"{name}.yaml", data)
        cases[name] = "refused", lambda path=path: load(Some, path)
        if isinstance(data, str) and len(data) < 10_000:
            value = data.partition(": ")[2] if "\n" not in data else data
            cases[f"{name}, override"] = "refused", lambda value=value: load(Some, sound, [f"seed={value}"])
    (tmp_path / "folder.yaml").mkdir()
    cases["a folder"] = "refused", lambda: load(Some, tmp_path / "folder.yaml")
    cases["a pipe"] = "refused", lambda: load(Some, tmp_path / "pipe.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    cases["a gigabyte"] = "refused", lambda: load(Some, hole_)
    hole_ = hole(tmp_path / "large.yaml", 1 << 40)
    assert survey(cases) == []
    assert not sign.exists()
    figures("R17", injected="recipes", times=len(cases), lost=0, wrong=0, note="all refused")


def read_all(folder: Path) -> None:
    """All that a training reads of a set."""
    reader = ShardReader([folder], "query", captions=True)
    assert len(reader.pids) == len(reader.camids) == len(reader.keys) == len(reader)
    for row in range(len(reader)):
        reader[row]


def with_rows(change):
    """The index of the small set after a change to its rows."""

    def make(folder: Path) -> bytes:
        rows = np.load(folder / "index-query.npy")
        change(rows)
        return npy(rows)

    return make


def field(name: str, value: int):
    def change(rows: np.ndarray) -> None:
        rows[name] = value

    return with_rows(change)


def index_files(sign: Path) -> dict:
    descr = index.row_type(7).descr
    objects = npy(np.array([pickle.loads(pickle.dumps(1))] * 5, dtype=object))
    at = objects.index(b"\n") + 1
    return {
        "Python objects": lambda _: objects[:at] + trapped(sign),
        "10^12 rows": lambda _: npy_claiming(descr, (10**12,)),
        "10^30 rows": lambda _: npy_claiming(descr, (10**30,)),
        "-1 rows": lambda _: npy_claiming(descr, (-1,)),
        "rows of 2 GB": lambda _: npy_claiming([*descr[:-1], ("key", "|S2000000000")], (5,)),
        "a deep header": lambda _: npy_claiming(descr, "(" * 3000 + ")" * 3000),
        "a call as header": lambda _: b"\x93NUMPY\1\0\x40\0" + b"__import__('os').system('x')".ljust(0x3F) + b"\n",
        "offset 2^64 - 1": field("offset", 2**64 - 1),
        "offset 2^63": field("offset", 2**63),
        "beyond the tar": field("offset", 10**9),
        "images of 4 GB": field("length", 2**32 - 1),
        "labels of 4 GB": field("meta_length", 2**32 - 1),
        "tar 4,000,000,000": field("shard", 4 * 10**9),
        "wrong sums": field("crc", 7),
    }


def test_indexes(small_set, tmp_path, figures):
    sign, cases = tmp_path / "sign", {}
    for number, (name, make) in enumerate(index_files(sign).items()):
        folder = Path(shutil.copytree(small_set, tmp_path / str(number)))
        put(folder / "index-query.npy", make(folder))
        cases[name] = "refused", lambda folder=folder: read_all(folder)
        cases[f"{name}, alone"] = (
            "refused or read",
            lambda folder=folder: index.load(folder / "index-query.npy")[:9].tolist(),
        )
    large = Path(shutil.copytree(small_set, tmp_path / "large"))
    rows = np.load(large / "index-query.npy")
    put(large / "index-query.npy", npy(np.resize(rows, 10**6)))
    tree = json.loads((large / "manifest.json").read_text())
    tree["splits"]["query"]["images"] = 10**6
    next(entry for entry in tree["shards"] if entry["split"] == "query")["samples"] = 10**6
    put(large / "manifest.json", json.dumps(tree))

    def look() -> None:
        reader = ShardReader([large], "query")
        assert len(reader.pids) == len(reader.keys) == 10**6
        assert reader[999_999].image

    cases["10^6 rows that are there"] = "read", look
    assert survey(cases) == []
    assert not sign.exists()
    figures("R17", injected="indexes of sets", times=len(cases), lost=0, wrong=0)


def manifests(small_set: Path) -> dict[str, bytes | str]:
    whole = json.loads((small_set / "manifest.json").read_text())

    def naming(name: str) -> str:
        tree = json.loads(json.dumps(whole))
        for entry in tree["shards"]:
            entry["name"] = name
        return json.dumps(tree)

    names = [
        "../x.tar",
        "a/../../x.tar",
        "..",
        "a/b.tar",
        "\0",
        "x\0.tar",
        "\ud800",
        "",
        "file:///etc/passwd",
        "local://x",
    ]
    names += ["zip://a.jpg::file:///etc/passwd", "memory://x", "/etc/../etc/passwd", "simplecache::http://127.0.0.1/x"]
    files: dict[str, bytes | str] = {f"a tar called {name!r}": naming(name) for name in names}
    counts = {"samples": -1, "size": 10**30, "crc32": -5}
    for key, value in counts.items():
        shards = [{**entry, key: value} for entry in whole["shards"]]
        files[f"{key} = {value}"] = json.dumps({**whole, "shards": shards})
    files |= {
        "deep": DEEP,
        "deep inside": json.dumps({**whole, "sources": "?"}).replace('"?"', DEEP),
        "five million lists": "[" + "[]," * 5_000_000 + "[]]",
        "no plan": json.dumps({**whole, "packing": {}}),
        "a split that is a path": json.dumps(whole).replace('"query"', '"../../x"'),
        "not UTF-8": b'{"a": "\xff"}',
        "a number of a million digits": '{"format_version": ' + "9" * 10**6 + "}",
    }
    return files


def test_manifests(small_set, tmp_path, figures):
    cases = {}
    for number, (name, data) in enumerate(manifests(small_set).items()):
        folder = tmp_path / str(number)
        shutil.copytree(small_set, folder)
        put(folder / "manifest.json", data)
        cases[name] = "refused", lambda folder=folder: read_all(folder)
    fetched = fsspec.filesystem("memory")
    whole = (small_set / "manifest.json").read_text()
    for number, name in enumerate(["/etc/passwd", "http://127.0.0.1:1/x.tar", "../x.tar"]):
        fetched.pipe(f"/set{number}/manifest.json", whole.replace("query-000000.tar", name).encode())
        cases[f"a fetched one names {name}"] = "refused", lambda number=number: read_manifest(f"memory://set{number}")
    pipe = Path(shutil.copytree(small_set, tmp_path / "pipe"))
    (pipe / "query-000000.tar").unlink()
    os.mkfifo(pipe / "query-000000.tar")
    cases["a pipe in the place of a tar"] = "refused", lambda: read_all(pipe)
    linked = Path(shutil.copytree(small_set, tmp_path / "linked"))
    (linked / "query-000000.tar").rename(tmp_path / "elsewhere.tar")
    (linked / "query-000000.tar").symlink_to(tmp_path / "elsewhere.tar")
    cases["a link to the tar"] = "read", lambda: read_all(linked)
    for number, target in enumerate(("/etc/passwd", "/dev/zero")):
        other = Path(shutil.copytree(small_set, tmp_path / f"other{number}"))
        (other / "query-000000.tar").unlink()
        (other / "query-000000.tar").symlink_to(target)
        cases[f"a link to {target}"] = "refused", lambda other=other: read_all(other)
    assert survey(cases) == []
    figures("R17", injected="manifests and files of sets", times=len(cases), lost=0, wrong=0)
