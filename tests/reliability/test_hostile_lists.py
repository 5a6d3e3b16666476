"""R17: keep-lists, embedding tables and lists of captions that want to run programs or take all memory."""

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from fuzzing import npy, npy_claiming, zipped
from hostile import DEEP, hole, put, survey, trapped, zip_bomb

from shards import keep_list
from shards.embeddings import EmbeddingTable, Keys
from shards.raw import captioned
from shards.reader import ShardReader

pytestmark = pytest.mark.row("R17")


def keep_lists(sign: Path, identity: dict) -> dict[str, bytes]:
    facts, rows = npy(np.array(json.dumps({"set": identity}))), npy(np.arange(3))
    objects = npy(np.array([1], dtype=object))
    at = objects.index(b"\n") + 1
    long = b"x" * 1_000_000
    lists = {f"runs a program {protocol}.pkl": trapped(sign, protocol) for protocol in range(6)}
    return lists | {
        "34 GB of notes.pkl": b"\x80\x02]r\xff\xff\xff\x7f.",
        "34 GB of notes, text.pkl": b"(lp2147483647\n.",
        "tuples in tuples as a key.pkl": b"\x80\x02})" + b"\x85" * 1_000_000 + b"K\x01s.",
        "lists in lists.pkl": b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".",
        "a name of 2^62 bytes.pkl": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"x.",
        "a long name a million times.pkl": b"\x80\x03](B" + struct.pack("<I", 10**6) + long + b"2" * 10**6 + b"e.",
        "a number of 400,000 digits.pkl": b"(lI" + b"9" * 400_000 + b"\na.",
        "one long name among many.txt": b"x\n" * 1_000_000 + long,
        "a path of 100,000 parts.txt": b"a/" * 100_000 + b"\n" + b"b\n" * 1000,
        "Python objects.npz": zipped({"rows.npy": objects[:at] + trapped(sign), "facts.npy": facts}),
        "10^12 rows.npz": zipped({"rows.npy": npy_claiming("<i8", (10**12,)), "facts.npy": facts}),
        "rows far away.npz": zipped({"rows.npy": npy(np.array([2**62])), "facts.npy": facts}),
        "deep facts.npz": zipped({"rows.npy": rows, "facts.npy": npy(np.array(DEEP))}),
        "2 GB of zeros.npz": zip_bomb("rows.npy", 2 << 30),
        "no zip.npz": b"PK\x05\x06" + bytes(18),
    }


def test_keep_lists(small_set, tmp_path, figures):
    sign, reader = tmp_path / "sign", ShardReader([small_set], "train")
    cases = {}
    for name, data in keep_lists(sign, reader.identity).items():
        path = put(tmp_path / name, data)
        cases[name] = "refused", lambda path=path: keep_list.load(path, reader)
    cases["a list of 1 TB.txt"] = "refused", lambda: keep_list.load(hole_, reader)
    hole_ = hole(tmp_path / "hole.txt", 1 << 40)
    os.mkfifo(tmp_path / "pipe.pkl")
    cases["a pipe.pkl"] = "refused", lambda: keep_list.load(tmp_path / "pipe.pkl", reader)
    assert survey(cases) == []
    assert not sign.exists()
    figures("R17", injected="keep-lists", times=len(cases), lost=0, wrong=0)


def test_tables_and_lists_of_captions(tmp_path, figures):
    sign = tmp_path / "sign"
    table = EmbeddingTable(np.ones((4, 3), np.float32), np.arange(4), np.arange(4), Keys("abcd"), {"made": 1})
    objects = npy(np.array([1], dtype=object))
    files = {
        "Python objects": ("features.npy", objects[: objects.index(b"\n") + 1] + trapped(sign)),
        "10^12 rows": ("features.npy", npy_claiming("<f4", (10**12, 3), bytes(48))),
        "more rows than told": ("features.npy", npy(np.ones((5, 3), np.float32))),
        "keys of 1 GB each": ("keys.npy", npy_claiming("|S1000000000", (4,))),
        "a deep table": ("table.json", DEEP),
        "five million lists": ("table.json", "[" + "[]," * 5_000_000 + "[]]"),
        "other rows": ("table.json", '{"format_version": 1, "facts": {}, "rows": "4", "dim": [3]}'),
    }
    cases = {}
    for number, (name, (file, data)) in enumerate(files.items()):
        table.save(tmp_path / str(number))
        put(tmp_path / str(number) / file, data)
        for mapped in (False, True):
            folder = tmp_path / str(number)
            cases[f"{name}, mapped {mapped}"] = "refused", lambda f=folder, m=mapped: EmbeddingTable.load(f, m)
    for name, data in {"deep": DEEP, "millions of lists": "[" + "[]," * 5_000_000 + "[]]", "text": b"\xff"}.items():
        path = put(tmp_path / f"{name}.json", data)
        cases[f"captions, {name}"] = "refused", lambda path=path: captioned.read_list(path)
    outside = put(
        tmp_path / "outside.json", json.dumps([{"file_path": "../../x", "id": 1, "captions": ["a"], "split": "train"}])
    )
    cases["captions of a file outside"] = "refused", lambda: captioned.read_list(outside)
    assert survey(cases) == []
    assert not sign.exists()
    figures("R17", injected="embedding tables, lists of captions", times=len(cases), lost=0, wrong=0)
