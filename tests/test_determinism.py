"""R18: nothing depends on Python's hash seed, the number of workers or the order in which folders are listed."""

import random
import shutil
import subprocess
import sys
from pathlib import Path

import killing
import pytest
import small
from writing import contents

# Python imports it at its start: every listing of a folder comes in an order of its own
SHUFFLED = """
import os, random

chance, listed, scanned = random.Random(os.environ["FOLDER_ORDER"]), os.listdir, os.scandir


class Scan(list):
    def __init__(self, *where):
        with scanned(*where) as entries:
            super().__init__(entries)
        chance.shuffle(self)

    def __next__(self):
        if not self:
            raise StopIteration
        return self.pop()

    def __iter__(self):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.clear()

    close = list.clear


def listdir(*where):
    names = listed(*where)
    chance.shuffle(names)
    return names


os.listdir, os.scandir = listdir, Scan
"""


def fresh(command: list[str], folder: Path, circumstance: int, **more) -> str:
    """What a command prints in a new interpreter whose hash seed and orders of folders are those of `circumstance`."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(SHUFFLED)
    seeds = {"PYTHONHASHSEED": str(circumstance), "FOLDER_ORDER": str(circumstance)}
    variables = small.environment(PYTHONPATH=str(folder), **seeds)
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=300, env=variables, **more
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def copied(data: Path, folder: Path, order: random.Random) -> Path:
    """A copy of a set whose files were written to disk in another order."""
    folder.mkdir()
    names = sorted(path.name for path in data.iterdir())
    for name in order.sample(names, len(names)):
        shutil.copyfile(data / name, folder / name)
    return folder


def pretrained(data: Path, folder: Path, circumstance: int, *more: str) -> Path:
    """The folder of a pretraining on a copy of `data`, with another number of workers in each circumstance."""
    folder.mkdir()
    own = copied(data, folder / "set", random.Random(circumstance))
    workers = [f"loader.workers={circumstance % 4}", f"loader.prefetch={1 + circumstance % 3}"]
    command = small.arguments("pretrain/run.py", folder / "run", own, *more, *workers)
    fresh(command, folder / "python", circumstance)
    return folder / "run"


@pytest.mark.row("R18")
def test_two_runs_under_other_circumstances(tmp_path, figures):
    drawn = small.drawn(tmp_path, small.UNLABELED)
    runs = [pretrained(drawn, tmp_path / f"{n}", n, "schedules.epochs=0.5") for n in (0, 2)]
    files = [f"checkpoints/{killing.newest(runs[0])}/tensors.safetensors", "teacher/model.safetensors"]
    lost, wrong = killing.compare(runs[1], runs[0], files)
    figures("R18", injected="hash seed, workers, order of folders", times=1, lost=lost, wrong=wrong)
    assert (lost, wrong) == (0, 0)
    assert len(small.metrics(runs[0])) == 4


@pytest.mark.soak
@pytest.mark.row("R18")
def test_many_runs_under_other_circumstances(tmp_path, figures):
    """Eight pretrainings over two epochs, and four fine-tunes of one teacher."""
    drawn, people = small.drawn(tmp_path, small.UNLABELED), small.drawn(tmp_path, small.LABELLED)
    runs = [pretrained(drawn, tmp_path / f"{n}", n, "schedules.epochs=2") for n in range(8)]
    files = [f"checkpoints/{killing.newest(runs[0])}/tensors.safetensors", "teacher/model.safetensors"]
    found = [killing.compare(run, runs[0], files) for run in runs[1:]]
    tuned = []
    for n in range(4):
        own = copied(people, tmp_path / f"people-{n}", random.Random(n))
        tuned.append(tmp_path / f"tuned-{n}")
        given = (f"benchmark.workers={n}", "optim.epochs=4")
        command = small.arguments("finetune/run.py", tuned[-1], own, *given, ckpt=runs[n] / "teacher")
        fresh(command, tmp_path / f"python-{n}", n)
    found += [killing.compare(out, tuned[0], ["model/model.safetensors"]) for out in tuned[1:]]
    scores = [small.json_of(out / "results.json")["average_precision"] for out in tuned]
    lost, wrong = (sum(part) for part in zip(*found, strict=True))
    wrong += sum(score != scores[0] for score in scores)
    note = "8 pretrainings, 4 fine-tunes; 0 to 3 workers; logs, states, teachers, models, results equal"
    injected = "hash seed, workers, prefetch, order of files and folders"
    figures("R18", injected=injected, times=len(found), lost=lost, wrong=wrong, note=note)
    assert (lost, wrong) == (0, 0)


@pytest.mark.row("R18")
def test_a_folder_listed_in_another_order_packs_to_the_same_bytes(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    for number in random.Random(0).sample(range(60), 60):
        (raw / f"{number:03}.bmp").write_bytes(_bmp(number))
    build, sets = [str(small.ROOT / "shards/build.py"), "folder:raw", "packing.shard_samples=16"], []
    for circumstance in (0, 1):
        out = tmp_path / f"set-{circumstance}"
        fresh([*build, "--out", str(out)], tmp_path / f"python-{circumstance}", circumstance, cwd=tmp_path)
        sets.append({name: data for name, data in contents(out).items() if name.endswith((".tar", ".npy"))})
    assert sets[0] == sets[1]
    assert len(sets[0]) == 5


def test_folders_are_listed_in_another_order(tmp_path):
    """What the tests above rest on."""
    names, listed = "abcdefgh", tmp_path / "listed"
    listed.mkdir()
    for name in names:
        (listed / name).write_text("")
    script = "import os, pathlib, sys; p = pathlib.Path(sys.argv[1])"
    script += "; print(*os.listdir(p), *(q.name for q in p.glob('*')))"
    orders = [fresh(["-c", script, str(listed)], tmp_path / "python", n).split() for n in (1, 2)]
    halves = [order[start : start + len(names)] for order in orders for start in (0, len(names))]
    assert all(sorted(half) == list(names) for half in halves)
    assert len({*map(tuple, halves), tuple(names)}) == 5


def _bmp(number: int) -> bytes:
    """A BMP of one pixel of its own colour."""
    header = b"BM" + (58).to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little")
    info = (40).to_bytes(4, "little") + (1).to_bytes(4, "little") * 2 + b"\x01\x00\x18\x00" + bytes(24)
    return header + info + bytes([number, 2 * number, 255 - number, 0])
