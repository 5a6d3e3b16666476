"""Files cut into parts: read like the whole, and a sentence where a part is missing."""

import gzip
import os
import random
import subprocess
from pathlib import Path

import pytest
from archive_files import contents, cut, expected, make_tar, make_zip

from recipes.errors import UserError
from shards.raw.split_files import find_parts, read_range
from shards.schema import BadSample


@pytest.mark.parametrize("make", [make_tar, make_zip])
@pytest.mark.parametrize("suffixes", ["001", "01", "000", "aa"])
@pytest.mark.parametrize("size", [613, 4096])
def test_parts_read_like_the_whole(tmp_path, make, suffixes, size):
    path = make(tmp_path / f"a.{'tar' if make is make_tar else 'zip'}")
    if suffixes == "aa":
        names = ["a" + chr(97 + i) for i in range(26)] + ["b" + chr(97 + i) for i in range(26)]
    else:
        names = [f"{i:0{len(suffixes)}d}" for i in range(int(suffixes), 99)]
    count = cut(path, size, names)
    assert count < len(names)
    for place in (tmp_path, f"{path}.{names[0]}"):
        assert contents(place) == expected("a")
    with pytest.raises(UserError, match="is a later part of a file that was cut"):
        contents(f"{path}.{names[2]}")
    Path(f"{path}.{names[2]}").rename(tmp_path / "away")
    find_parts.cache_clear()
    with pytest.raises(UserError, match=rf"\.{names[2]} is missing"):
        contents(tmp_path)


def test_the_first_or_last_part_is_missing(tmp_path):
    cut(make_tar(tmp_path / "a.tar"), 4096, ["001", "002", "003", "004", "005", "006", "007", "008"])
    last = max(tmp_path.iterdir())
    last.rename(tmp_path / "away")
    with pytest.raises(UserError, match="the part that is missing"):
        contents(tmp_path)
    (tmp_path / "a.tar.001").rename(tmp_path / "away too")
    with pytest.raises(UserError, match=r"a\.tar\.001 is missing, the first part"):
        contents(tmp_path)


def test_ranges_of_parts_against_slices(tmp_path):
    data = random.Random(1).randbytes(5000)
    (tmp_path / "a.tar").write_bytes(data)
    cut(tmp_path / "a.tar", 700, [f"{i:03d}" for i in range(1, 9)])
    path = f"{tmp_path}/a.tar.001"
    dice = random.Random(2)
    for _ in range(300):
        start = dice.randrange(5001)
        length = dice.randrange(5001 - start)
        assert read_range(path, start, length) == data[start : start + length]
    for start, length in [(4990, 11), (5000, 1), (6000, 1), (0, 5001)]:
        with pytest.raises(BadSample, match="ends in the middle of a sample"):
            read_range(path, start, length)
    for length in (-1, 2**40):
        with pytest.raises(BadSample, match="are no crop"):
            read_range(path, 0, length)


@pytest.mark.parametrize("parts", [False, True])
def test_compressed_tars_name_a_command_that_works(tmp_path, parts):
    make_tar(tmp_path / "a.tar")
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    (tmp_path / "a.tar").unlink()
    if parts:
        cut(tmp_path / "a.tar.gz", 5000, [f"{i:02d}" for i in range(9)])
    with pytest.raises(UserError, match="is compressed with gzip") as caught:
        contents(tmp_path)
    subprocess.run(str(caught.value).partition("run: ")[2], shell=True, check=True)
    assert contents(tmp_path / "a.tar") == expected("a")


def test_open_files_are_bounded(tmp_path):
    for number in range(100):
        make_tar(tmp_path / f"{number:03d}.tar", {"1.jpg": b"%d" % number})
    before = len(os.listdir("/proc/self/fd"))
    assert len(contents(tmp_path)) == 100
    assert len(os.listdir("/proc/self/fd")) - before <= 64
