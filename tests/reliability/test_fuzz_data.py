"""Thousands of damaged and made-up recipes, indexes, manifests and keep-lists: each gives a value or one sentence."""

import json
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzzing import (
    EDGES,
    TOKENS,
    Reader,
    as_json,
    changed_bytes,
    changed_trees,
    filed,
    fuzz_all,
    npy,
    npy_claiming,
    passed_over,
    zipped,
)
from hypothesis import strategies as st

from pretrain.config import PretrainConfig
from recipes.load import dump, load, recipe_path
from shards import index, keep_list
from shards.embeddings import Keys
from shards.reader import ShardReader

Inputs = list[tuple[st.SearchStrategy, Reader]]
PIECES = [
    *(
        "!!python/object/apply:os.system [x]",
        "&a",
        "*a",
        "<<: *a",
        "!!int ",
        "!!set ",
        "!!binary x",
        "!!timestamp 7",
        "? ",
    ),
    *(": ", "- ", "|\n", ">\n", "\t", "0x", "0b", "1:60", "!!float x", "!!omap ", "%YAML 9.9\n", "---\n", "...\n", "'"),
    *('"', "9" * 5000, "1e99999", "!!null x", "=", "<<", "{[a]: 1}", "{{}: 1}", "0b_", "!!bool 7", "\u2028", "\ufeff"),
]


def recipes(tmp_path: Path) -> Inputs:
    files = [path.read_bytes() for path in sorted(recipe_path("pretrain").glob("*.yaml"))]
    read = filed(tmp_path / "recipe.yaml", lambda path: dump(load(PretrainConfig, path)))
    tokens = [*TOKENS, *(piece.encode() for piece in PIECES)]
    ascii_only = [token for token in tokens if token.isascii()]
    words = st.sampled_from([*PIECES, " ", "\n", "a", "loader", "seed", "{", "}", "[", "]", ",", "1"])
    sound = tmp_path / "sound.yaml"
    sound.write_bytes(files[0])
    keys = st.sampled_from(["seed=", "loader.batch=", "loader=", "a.b.c=", "views.global_size=", "=", ""])
    overrides = st.builds(str.__add__, keys, st.lists(words, max_size=6).map("".join))
    return [
        (changed_bytes(files, tokens), read),
        (changed_bytes(files, ascii_only), read),
        (changed_trees(load(PretrainConfig, sound).model_dump(mode="json")).map(as_json), read),
        (st.lists(words, max_size=20).map(lambda parts: "".join(parts).encode()), read),
        (overrides, lambda text: load(PretrainConfig, sound, [text])),
    ]


def read_all(folder: Path) -> None:
    """All that a training reads of a split."""
    reader = ShardReader([folder], "query", captions=True)
    try:
        assert len(reader.pids) == len(reader.camids) == len(reader.keys) == len(reader)
        for row in range(min(len(reader), 8)):
            passed_over(lambda row=row: reader[row])
    finally:
        reader.close()


@st.composite
def changed_rows(draw: st.DrawFn, rows: np.ndarray) -> bytes:
    """An index whose fields have other numbers."""
    rows = rows.copy()
    for _ in range(draw(st.integers(1, 3))):
        row, name = draw(st.integers(0, len(rows) - 1)), draw(st.sampled_from(rows.dtype.names))
        if name == "key":
            rows[name][row] = draw(st.binary(max_size=8))
        else:
            span = np.iinfo(rows.dtype[name])
            fitting = [edge for edge in (*EDGES, int(span.max)) if span.min <= edge <= span.max]
            rows[name][row] = draw(st.sampled_from(fitting) | st.integers(0, 30_000))
    return npy(rows)


SHAPES = [(5,), (10**12,), (-1,), (10**30,), (2, 3), (), (True,), "x", None, (5.0,), (0,), (2**63,)]
DESCRS = ["|O", "<f8", "|V1000000000", "|S999999999999", [("a", "<f8")], [("key", "|S8")], "<M8[s]", 5, None, "(" * 150]


def indexes(tmp_path: Path) -> Inputs:
    file = tmp_path / "set" / "index-query.npy"
    whole, rows = file.read_bytes(), np.load(file)

    def read(data: bytes) -> None:
        file.write_bytes(data)
        passed_over(lambda: index.load(file)[:3].tolist())
        read_all(file.parent)

    own = index.row_type(8).descr
    headers = st.builds(
        npy_claiming,
        st.sampled_from([own, own * 2, *DESCRS]),
        st.sampled_from(SHAPES),
        st.just(whole[-600:]),
        st.booleans(),
    )
    return [(changed_bytes([whole]), read), (changed_rows(rows), read), (headers, read)]


def manifests(tmp_path: Path) -> Inputs:
    file = tmp_path / "set" / "manifest.json"
    whole = file.read_bytes()
    read = filed(file, lambda path: read_all(path.parent))
    return [
        (changed_bytes([whole, as_json(json.loads(whole))]), read),
        (changed_trees(json.loads(whole)).map(as_json), read),
    ]


# the codes of pickle, one each with its argument
CODES = [
    *(
        b"(",
        b".",
        b"0",
        b"1",
        b"2",
        b"F1.5\n",
        b"I1\n",
        b"I" + b"9" * 5000 + b"\n",
        b"J\1\0\0\0",
        b"K\1",
        b"L5L\n",
        b"M\1\0",
    ),
    *(
        b"N",
        b"P1\n",
        b"Q",
        b"R",
        b"S'a'\n",
        b"T\3\0\0\0abc",
        b"U\1a",
        b"V\\u0041\n",
        b"X\1\0\0\0a",
        b"a",
        b"b",
        b"d",
        b"}",
    ),
    *(
        b"cos\nsystem\n",
        b"cbuiltins\neval\n",
        b"c_codecs\nencode\n",
        b"e",
        b"g0\n",
        b"h\0",
        b"i os\nsystem\n",
        b"j\0\0\0\0",
    ),
    *(b"l", b"]", b"o", b"p0\n", b"q\0", b"r\5\0\0\0", b"r\xff\xff\xff\x7f", b"s", b"t", b")", b"u", b"G" + bytes(8)),
    *(b"\x80\2", b"\x80\5", b"\x80\xff", b"\x81", b"\x82\1", b"\x85", b"\x86", b"\x87", b"\x88", b"\x89", b"\x8a\1\5"),
    *(
        b"\x8b\1\0\0\0\5",
        b"\x8c\1a",
        b"\x8d\1" + bytes(7) + b"a",
        b"\x8e\1" + bytes(7) + b"a",
        b"\x8f",
        b"\x90",
        b"\x91",
    ),
    *(b"\x92", b"\x93", b"\x94", b"\x95" + bytes(8), b"\x96\1" + bytes(7) + b"a", b"\x97", b"\x98", b"X\4\0\0\0keys"),
    *(b"B\1\0\0\0a", b"C\1a", b"X\3\0\0\0\xed\xa0\x80"),
]
ROWS = [
    np.arange(5),
    np.zeros(0, np.int64),
    np.array([-1]),
    np.array([10**9]),
    np.zeros((2, 2), np.int64),
    np.array([1.5]),
]
ROWS += [np.array(["a"]), np.array(5), np.array([2**63 - 1]), np.array([None]), np.array([True])]


def keep_lists(tmp_path: Path) -> Inputs:
    reader = ShardReader([tmp_path / "set"], "train")
    names, facts = [*Keys(reader.keys[:20])], {"set": reader.identity, "score": 1.5}
    keep_list.save(tmp_path / "whole.npz", np.arange(20), Keys(reader.keys), facts)
    trees = (names, {"keys": names}, [name.encode() for name in names], tuple(names), [1, 2.5, None, True, {"a": [1]}])
    pickles = [pickle.dumps(tree, protocol) for tree in trees for protocol in range(6)]

    def by(ending: str) -> Reader:
        return filed(tmp_path / f"list{ending}", lambda path: keep_list.load(path, reader))

    def npz(tree: Any, rows: bytes, method: int) -> bytes:
        return zipped({"rows.npy": rows, "facts.npy": npy(np.array(as_json(tree).decode()))}, method)

    claims = st.builds(npy_claiming, st.sampled_from(["<i8", *DESCRS]), st.sampled_from(SHAPES), st.just(bytes(80)))
    methods = st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    return [
        (changed_bytes([(tmp_path / "whole.npz").read_bytes()]), by(".npz")),
        (st.builds(npz, changed_trees(facts), st.sampled_from(ROWS).map(npy), methods), by(".npz")),
        (st.builds(npz, st.just(facts), claims, methods), by(".npz")),
        (changed_bytes(pickles), by(".pkl")),
        (
            st.lists(st.sampled_from(CODES), min_size=1, max_size=14).map(lambda codes: b"".join(codes) + b"."),
            by(".pkl"),
        ),
        (changed_bytes(["\n".join(names).encode()]), by(".txt")),
    ]


READERS = {"recipe": recipes, "index": indexes, "manifest": manifests, "keep-list": keep_lists}


@pytest.mark.row("R17")
@pytest.mark.parametrize("times", [100, pytest.param(5_000, marks=pytest.mark.soak)])
@pytest.mark.parametrize("name", READERS)
def test_readers(name, times, small_set, tmp_path, figures):
    shutil.copytree(small_set, tmp_path / "set")
    fuzz_all(f"{name} reader", READERS[name](tmp_path), times, figures)
