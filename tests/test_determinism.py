"""Nothing depends on Python's hash seed, the number of workers or the order of files on disk."""

import shutil
import subprocess
import sys

import small
from writing import contents


def test_two_runs_under_other_circumstances(tmp_path):
    """A set packed twice, its crops written to disk in opposite orders; two pretrainings on the two sets."""
    drawn = small.drawn(tmp_path, small.UNLABELED)
    names = sorted(path.name for path in drawn.iterdir())
    for name, order in (("a", names), ("b", names[::-1])):
        (tmp_path / name).mkdir()
        for file in order:
            shutil.copyfile(drawn / file, tmp_path / name / file)
    logs = []
    for name, seed, workers in (("a", "0", 0), ("b", "12345", 2)):
        given = ["schedules.epochs=0.5", f"loader.workers={workers}"]
        command = small.arguments("pretrain/run.py", tmp_path / f"run-{name}", tmp_path / name, *given)
        subprocess.run(
            [sys.executable, *command],
            check=True,
            capture_output=True,
            timeout=120,
            env=small.environment(PYTHONHASHSEED=seed),
        )
        logs.append(small.repeatable(small.metrics(tmp_path / f"run-{name}")))
    assert logs[0] == logs[1]
    assert len(logs[0]) == 4
    weights = [(tmp_path / f"run-{name}" / "teacher" / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


def test_a_folder_listed_in_another_order_packs_to_the_same_bytes(tmp_path):
    sources = {}
    for name in ("a", "b"):
        folder = tmp_path / name / "raw"
        folder.mkdir(parents=True)
        numbers = range(60) if name == "a" else range(59, -1, -1)
        for number in numbers:
            (folder / f"{number:03}.bmp").write_bytes(_bmp(number))
        sources[name] = folder
    for seed, (name, folder) in enumerate(sources.items()):
        command = [sys.executable, str(small.ROOT / "shards/build.py"), "folder:raw", "--out", "../set-" + name]
        subprocess.run(
            [*command, "packing.shard_samples=16"],
            check=True,
            capture_output=True,
            cwd=folder.parent,
            env=small.environment(PYTHONHASHSEED=str(seed)),
        )
    sets = [contents(tmp_path / f"set-{name}") for name in sources]
    tars = [{name: data for name, data in each.items() if name.endswith((".tar", ".npy"))} for each in sets]
    assert tars[0] == tars[1]
    assert len(tars[0]) == 5


def _bmp(number: int) -> bytes:
    """A BMP of one pixel of its own colour."""
    header = b"BM" + (58).to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little")
    info = (40).to_bytes(4, "little") + (1).to_bytes(4, "little") * 2 + b"\x01\x00\x18\x00" + bytes(24)
    return header + info + bytes([number, 2 * number, 255 - number, 0])
