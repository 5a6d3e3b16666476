"""Keep-lists: names in all their forms, rows of one set only, and lists from strangers."""

import pickle
import random
import subprocess

import numpy as np
import pytest

from recipes.errors import UserError
from shards import keep_list
from shards.embeddings import Keys
from shards.name_lists import read_names


class AReader:
    """Keys and identity, as a ShardReader has them."""

    def __init__(self, keys, plan="one"):
        self.keys = np.array([key.encode() for key in keys])
        self.identity = {"sets": [{"plan": plan, "splits": ["unlabeled"]}], "samples": len(keys)}

    def __len__(self):
        return len(self.keys)


LUPERSON = ["34_01_0341_00001865", "34_01_0341_00001866", "9_2_1_1"]


def rows_of(names, keys):
    return keep_list.find_rows(names, AReader(keys).keys).tolist()


@pytest.mark.parametrize("form", ["{}", "{}.jpg", "{}.JPG", "{}.jpeg", "./{}.png", "i/{}.jpg", "/a/b/{}.bmp"])
def test_names_of_a_flat_set(form):
    names = [form.format(key) for key in reversed(LUPERSON)]
    assert rows_of(names, LUPERSON) == [2, 1, 0]
    assert rows_of(names, [f"s0/{key}" for key in LUPERSON]) == [2, 1, 0]


def test_names_with_folders():
    keys = ["a/1", "a/2", "b/2", "b/3_x"]
    assert rows_of(["a/1.jpg", "b/2", "images/a/2.jpg", "3 x.png", "3.x", "c/1", "1"], keys) == [0, 2, 1, 3, 3, -1, 0]
    assert rows_of(["a/1.jpg", "x/a/2"], [f"s1/{key}" for key in keys]) == [0, 1]
    with pytest.raises(UserError, match="name '2' means more than one sample"):
        rows_of(["1", "2"], keys)
    assert rows_of(["s0/x", "s1/x"], ["s1/x", "s0/x"]) == [1, 0]
    with pytest.raises(UserError, match="name 'x' means more than one"):
        rows_of(["x.jpg"], ["s1/x", "s0/x"])


def test_a_part_of_a_name_is_no_match():
    # one must be the end of the other in whole parts
    assert rows_of(["1865", "x34_01_0341_00001865", "34_01_0341_0000186"], LUPERSON) == [-1, -1, -1]
    assert rows_of(["test/1"], ["train/1"]) == [-1]
    assert rows_of(["", "/", ".jpg"], ["a", "b/c"]) == [-1, -1, -1]


def test_a_suffix_may_belong_to_the_key():
    assert rows_of(["1.png", "1.jpg", "2.jpg"], ["1", "1_png", "2_jpg"]) == [0, 0, 2]
    assert rows_of(["a/2.jpg"], ["b/a/2_jpg"]) == [0]


def test_against_brute_force():
    rng = random.Random(0)
    parts = ["a", "b", "cc", "d.e", "f g"]

    def ends(whole, end):
        return whole == end or whole.endswith("/" + end)

    for _ in range(300):
        keys = list({"/".join(rng.choices(["a", "b", "cc", "d_e", "f_g"], k=rng.randint(1, 3))) for _ in range(4)})
        name = "/".join(rng.choices(parts, k=rng.randint(1, 3)))
        plain = name.replace(".", "_").replace(" ", "_")
        longer = [row for row, key in enumerate(keys) if ends(plain, key)]  # the name is the longer one
        shorter = [row for row, key in enumerate(keys) if ends(key, plain)]
        try:
            found = rows_of([name + ".jpg"], keys)[0]
        except UserError:
            assert not longer
            assert len(shorter) > 1
            continue
        if longer:
            assert keys[found] == max((keys[row] for row in longer), key=len)
        elif shorter:
            # of keys that end with it those are asked first that have the fewest folders before
            assert found in shorter
        else:
            assert found == -1


@pytest.mark.parametrize("suffix", [".pkl", ".txt"])
def test_lists_of_names(tmp_path, capsys, suffix):
    reader, path = AReader(LUPERSON), tmp_path / f"list{suffix}"
    keep_list.save(path, np.array([2, 0]), Keys(reader.keys), {})
    assert read_names(path) == ["9_2_1_1.jpg", "34_01_0341_00001865.jpg"], "the published form, best first"
    assert keep_list.load(path, reader).tolist() == [0, 2]
    assert keep_list.ordered(path, reader).tolist() == [2, 0]
    assert capsys.readouterr() == ("", "")
    keep_list.write_names(path, ["9_2_1_1.jpg", "lost.jpg", "gone.jpg", "9_2_1_1"])
    assert keep_list.load(path, reader).tolist() == [2]
    assert "2 of 4 names are not in the set, 'lost.jpg' for one" in capsys.readouterr().err
    keep_list.write_names(path, ["lost.jpg", "gone.jpg"])
    with pytest.raises(UserError, match=r"none of the 2 names .* a name is 'lost.jpg', a key '34_01_0341_00001865'"):
        keep_list.load(path, reader)


def test_only_one_process_tells(tmp_path, capsys, monkeypatch):
    path = tmp_path / "list.txt"
    path.write_text("9_2_1_1\nlost\n")
    monkeypatch.setenv("RANK", "1")
    assert keep_list.load(path, AReader(LUPERSON)).tolist() == [2]
    assert capsys.readouterr().err == ""


def test_rows_belong_to_one_set(tmp_path):
    reader, path = AReader(LUPERSON), tmp_path / "deep" / "keep.npz"
    facts = {"set": reader.identity, "by": "cfs"}
    keep_list.save(path, np.array([2, 0]), Keys(reader.keys), facts)
    found = keep_list.load(path, reader)
    assert found.tolist() == [0, 2]
    assert found.dtype == np.int64
    with pytest.raises(UserError, match=r"belongs to the set .*one.*, not to .*two"):
        keep_list.load(path, AReader(LUPERSON, "two"))
    first = path.read_bytes()
    keep_list.save(path, np.array([0, 2]), Keys(reader.keys), facts)
    assert path.read_bytes() == first, "nothing of the clock in it"


def damaged_npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_faults_name_the_file(tmp_path):
    reader = AReader(LUPERSON)
    facts = np.array(keep_list.json.dumps({"set": reader.identity}))
    for name, arrays, match in [
        ("a.npz", {"rows": np.array([0, 3]), "facts": facts}, "names row 3 of 3"),
        ("b.npz", {"rows": np.array([-1, 2]), "facts": facts}, "names row -1 of 3"),
        ("c.npz", {"rows": np.array([0.5]), "facts": facts}, "holds no rows"),
        ("d.npz", {"rows": np.zeros(0, np.int64), "facts": facts}, "holds no rows"),
        ("e.npz", {"rows": np.array([1])}, "is no keep-list of shards/cfs_keep.py"),
        ("f.npz", {"rows": np.array([1]), "facts": np.array("[]")}, "is no keep-list"),
        ("g.npz", {"rows": np.array([{}], dtype=object), "facts": facts}, "is no keep-list"),
    ]:
        with pytest.raises(UserError, match=match):
            keep_list.load(damaged_npz(tmp_path / name, **arrays), reader)
    (tmp_path / "h.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-30])
    with pytest.raises(UserError, match=r"h\.npz is no keep-list"):
        keep_list.load(tmp_path / "h.npz", reader)
    with pytest.raises(UserError, match=r"gone\.npz"):
        keep_list.load(tmp_path / "gone.npz", reader)
    with pytest.raises(UserError, match=r"ending must be \.npz, \.pkl, \.txt"):
        keep_list.load(tmp_path / "list.csv", reader)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match="has 0 names"):
        keep_list.load(tmp_path / "empty.txt", reader)


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return subprocess.call, (["touch", str(self.path)],)


def test_a_pickle_that_runs_something_is_refused(tmp_path):
    trap = tmp_path / "sprung"
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(["9_2_1_1.jpg", Evil(trap)]))
    with pytest.raises(UserError, match="nothing of it was run"):
        keep_list.load(tmp_path / "evil.pkl", AReader(LUPERSON))
    assert not trap.exists()
