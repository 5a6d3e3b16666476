"""Indexing the tars of a set: our own walk through the headers against tarfile, which the textbook way is made of.

    python bench/index.py

2,000 samples a tar, each random bytes of the size of a 20 kB JPEG with a small json. Both take the place and the crc32
of every member and read the labels, from tars that are in the page cache, on one core; both must find the same.
"""

import argparse
import io
import json
import tarfile
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pairs

from shards import index


def write_tar(path: Path, samples: int, size: int, rng: np.random.Generator) -> None:
    """One tar of drawn samples."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(samples):
            labels = json.dumps({"pid": number, "camid": number % 6}).encode()
            length = int(rng.integers(size // 2, size + size // 2))
            for suffix, data in (("jpg", rng.bytes(length)), ("json", labels)):
                member = tarfile.TarInfo(f"{path.stem}/{number:06}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def textbook(path: Path) -> list[tuple]:
    """Key, place and crc32 of image and labels, pid and camid of every sample."""
    samples: dict[str, dict[str, tuple]] = {}
    labels: dict[str, dict] = {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if not member.isreg():
                continue
            key, _, suffix = member.name.partition(".")
            data = tar.extractfile(member).read()
            samples.setdefault(key, {})[suffix] = (member.offset_data, member.size, zlib.crc32(data))
            if suffix == "json":
                labels[key] = json.loads(data)
    return [(key, *at["jpg"], *at["json"], labels[key]["pid"], labels[key]["camid"]) for key, at in samples.items()]


def ours_as_tuples(path: Path) -> list[tuple]:
    """The rows of our index in the same form."""
    names = ("offset", "length", "crc", "meta_offset", "meta_length", "meta_crc", "pid", "camid")
    return [(row["key"].decode(), *(int(row[name]) for name in names)) for row in index.scan_tar(path)]


def main() -> None:
    """Check that both agree, time them, print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tars", type=int, default=3)
    parser.add_argument("--samples", type=int, default=2000, help="in each tar")
    parser.add_argument("--size", type=int, default=20_000, help="bytes of an image, on average")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        tars = [Path(folder, f"{number:03}.tar") for number in range(given.tars)]
        for tar in tars:
            write_tar(tar, given.samples, given.size, rng)
        assert [ours_as_tuples(tar) for tar in tars] == [textbook(tar) for tar in tars]
        megabytes = sum(tar.stat().st_size for tar in tars) / 1e6
        pair = pairs.Pair(
            lambda: [index.scan_tar(tar) for tar in tars], lambda: [textbook(tar) for tar in tars], given.rounds
        )
        whole = [
            pairs.seconds(lambda: [index.inspect_tar(tar, whole=True) for tar in tars]) for _ in range(given.rounds)
        ]
    numbers = pair.numbers(1.0)
    numbers |= {way: round(megabytes / numbers[way]) for way in ("ours", "textbook")}
    told = {
        "tars": f"{given.tars} x {given.samples} x {given.size / 1e3:g} kB",
        "samples_per_s": round(given.tars * given.samples * numbers["ours"] / megabytes),
        "with_crc_of_the_file": round(megabytes / float(np.median([time.wall for time in whole]))),
    }
    pairs.report("index", numbers, "MB/s/core", pair.peak_mb, 1, **told)


if __name__ == "__main__":
    main()
