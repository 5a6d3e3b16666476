"""Lists of names: every form that they are published in, and pickles that want to run something."""

import copyreg
import os
import pickle
import subprocess
import sys

import pytest

from recipes.errors import UserError
from shards.name_lists import read_names, write_names

NAMES = ["34_01_0341_00001865.jpg", "00_00_0000_00000000.jpg", "café 日本.jpg"]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("shape", [list, tuple, lambda names: {"keys": names, "sizes": [1, 2.5, None, True]}])
def test_all_published_forms_are_read(tmp_path, protocol, binary, shape):
    names = [name.encode() for name in NAMES] if binary else NAMES
    path = tmp_path / "keys.pkl"
    path.write_bytes(pickle.dumps(shape(names), protocol))
    assert read_names(path) == NAMES


def test_a_list_of_python_2(tmp_path):
    # cPickle.dumps(["a_1", "b_2"], 2) and (…, 0) of Python 2: 8-bit strings
    (tmp_path / "binary.pkl").write_bytes(b"\x80\x02]q\x01(U\x03a_1q\x02U\x03b_2q\x03e.")
    (tmp_path / "text.pkl").write_bytes(b"(lp1\nS'a_1'\np2\naS'b_2'\np3\na.")
    assert read_names(tmp_path / "binary.pkl") == read_names(tmp_path / "text.pkl") == ["a_1", "b_2"]


def test_text(tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes(b"a.jpg\r\n\nb c.jpg\n")
    assert read_names(path) == ["a.jpg", "b c.jpg"]


@pytest.mark.parametrize("name", ["keep.pkl", "keep.txt"])
def test_written_lists_come_back(tmp_path, name):
    write_names(tmp_path / name, iter(NAMES))
    assert read_names(tmp_path / name) == NAMES
    write_names(tmp_path / name, [])
    assert read_names(tmp_path / name) == []
    assert os.listdir(tmp_path) == [name]


def test_a_written_pickle_is_a_plain_list(tmp_path):
    write_names(tmp_path / "keep.pkl", NAMES)
    data = (tmp_path / "keep.pkl").read_bytes()
    assert pickle.loads(data) == NAMES
    assert data[:2] == b"\x80\x02"  # the newest protocol that Python 2 reads too


@pytest.mark.parametrize("names", [["a\nb"], [b"a"], [" "], [3]])
def test_names_that_cannot_be_written(tmp_path, names):
    with pytest.raises(UserError, match="cannot stand in the list"):
        write_names(tmp_path / "keep.txt", names)
    assert not list(tmp_path.iterdir())


class Attack:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def attacks(command):
    text = command.encode()
    system = os.system.__module__.encode()  # posix
    short = bytes([len(text)]) + text
    for protocol in range(6):
        yield f"reduce {protocol}", pickle.dumps([Attack(command)], protocol)
        yield f"in a dict {protocol}", pickle.dumps({"keys": NAMES, "x": Attack(command)}, protocol)
    yield "inst", b"(S'" + text + b"'\nios\nsystem\n."
    yield "obj", b"(cos\nsystem\nS'" + text + b"'\no."
    yield "stack global", b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + short + b"\x85R."
    yield "newobj", b"\x80\x02c" + system + b"\nsystem\nU" + short + b"\x85\x81."
    yield "extension", b"\x80\x02\x82\xf0U" + short + b"\x85R."
    yield "persistent", b"\x80\x02U" + short + b"Q."
    yield "persistent text", b"P" + text + b"\n."
    yield "builtins", b'cbuiltins\neval\n(S\'__import__("os").system("' + text + b"\")'\ntR."
    yield "codec", b"c_codecs\nencode\n(V" + text + b"\nVrot13\ntR."
    yield "codec state", b"c_codecs\nencode\n}(S'__call__'\nS'x'\nsb."
    yield "dotted", b"\x80\x04\x8c\x07_codecs\x8c\x0dencode.__self__\x93."
    yield "nested", pickle.dumps([["a", "b"], Attack(command)])


CASES = [name for name, _ in attacks("true")]


@pytest.mark.parametrize("case", CASES)
def test_nothing_in_a_pickle_is_run(tmp_path, case):
    sign = tmp_path / "sign"
    path = tmp_path / "keys.pkl"
    copyreg.add_extension("os", "system", 0xF0)
    try:
        path.write_bytes(dict(attacks(f"touch {sign}"))[case])
        with pytest.raises(UserError, match=r"keys\.pkl (is not a pickled list of names|holds)"):
            read_names(path)
    finally:
        copyreg.remove_extension("os", "system", 0xF0)
    assert not sign.exists()


def test_the_attacks_are_real(tmp_path):
    # the same bytes, read the usual way, do leave their sign
    for case in ("reduce 4", "inst", "obj", "stack global"):
        sign, path = tmp_path / "sign", tmp_path / "keys.pkl"
        path.write_bytes(dict(attacks(f"touch {sign}"))[case])
        subprocess.run([sys.executable, "-c", f"import pickle; pickle.load(open({str(path)!r}, 'rb'))"], check=True)
        assert sign.exists(), case
        sign.unlink()


def test_an_extension_that_was_used_before_is_refused_too(tmp_path):
    sign, path = tmp_path / "sign", tmp_path / "keys.pkl"
    copyreg.add_extension("os", "system", 0xF0)
    try:
        assert pickle.loads(b"\x80\x02\x82\xf0.") is os.system  # now it is in the cache, which asks nobody
        path.write_bytes(dict(attacks(f"touch {sign}"))["extension"])
        with pytest.raises(UserError, match="nothing of it was run"):
            read_names(path)
    finally:
        copyreg.remove_extension("os", "system", 0xF0)
    assert not sign.exists()


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ({"names": ["a"]}, "a dict without 'keys' .it has 'names'"),
        ({"keys": {"a": 1}}, "holds dict, not a list"),
        ("a", "holds str, not a list"),
        (["a", 3], "holds int '3' among its names"),
        ([["a"]], "holds list"),
    ],
)
def test_trees_that_are_no_list_of_names(tmp_path, tree, sentence):
    (tmp_path / "keys.pkl").write_bytes(pickle.dumps(tree))
    with pytest.raises(UserError, match=sentence):
        read_names(tmp_path / "keys.pkl")


def test_damaged_missing_and_unknown_files(tmp_path):
    good = pickle.dumps(NAMES)
    for cut in range(len(good)):
        (tmp_path / "keys.pkl").write_bytes(good[:cut])
        with pytest.raises(UserError, match="is not a pickled list of names"):
            read_names(tmp_path / "keys.pkl")
    with pytest.raises(UserError, match=r"none\.pkl does not exist"):
        read_names(tmp_path / "none.pkl")
    with pytest.raises(UserError, match=r"names\.json is no list of names; its ending must be \.pkl or \.txt"):
        read_names(tmp_path / "names.json")
    with pytest.raises(UserError, match=r"its ending must be"):
        write_names(tmp_path / "names.json", NAMES)


def test_a_huge_file_is_not_read(tmp_path):
    with (tmp_path / "keys.pkl").open("wb") as file:
        file.truncate(2**31 + 1)  # a hole, no bytes on disk
    with pytest.raises(UserError, match="no list of names is larger"):
        read_names(tmp_path / "keys.pkl")
