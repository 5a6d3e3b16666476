"""R7: a pretraining on damaged shards: what is lost is counted exactly, nothing else changes, and too much stops it."""

import functools
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import small
import together
from forked import Server
from writing import crop

from pretrain.loader import LoaderConfig
from shards import index
from shards.images import ImagesConfig
from shards.packing import PackingConfig
from shards.schema import Record
from shards.writer import pack

LARGE = ["schedules.epochs=1", "loader.batch=100", "loader.batch_per_device=100", "loader.workers=2"]
DEFAULT = LoaderConfig.model_fields["max_bad"].default  # 0.1 %


def flipped(raw: bytearray, rows: np.ndarray, rng: np.random.Generator, count: int) -> None:
    """One bit in each of so many images."""
    for row in rng.choice(rows, count, replace=False):
        raw[int(row["offset"]) + int(rng.integers(row["length"]))] ^= 1 << int(rng.integers(8))


def cut(raw: bytearray, rows: np.ndarray, rng: np.random.Generator, count: int) -> None:
    """The file ends inside the image that is the last but so many."""
    first = np.sort(rows, order="offset")[-count]
    del raw[int(first["offset"]) + int(rng.integers(first["length"])) :]


def zeroed(raw: bytearray, rows: np.ndarray, rng: np.random.Generator, count: int) -> None:
    """A block of zeros over so many images, one after the other."""
    ordered = np.sort(rows, order="offset")
    start = int(rng.integers(len(ordered) - count + 1))
    begin, end = ordered[start], ordered[start + count - 1]
    raw[int(begin["offset"]) + 4 : int(end["offset"]) + 8] = bytes(int(end["offset"]) + 4 - int(begin["offset"]))


def damage(folder: Path, how, count: int, seed: int) -> list[int]:
    """Damage so many images of one tar of a set; the rows of the set whose bytes are not as they were."""
    rows = np.array(index.load(folder / "index-unlabeled.npy"))
    rng = np.random.default_rng(seed)
    tar = int(rng.integers(rows["shard"].max() + 1))
    path = folder / f"unlabeled-{tar:06d}.tar"
    whole, ours = path.read_bytes(), np.flatnonzero(rows["shard"] == tar)
    raw = bytearray(whole)
    how(raw, rows[ours], rng, count)
    path.write_bytes(raw)
    spans = {int(row): slice(rows["offset"][row], rows["offset"][row] + rows["length"][row]) for row in ours}
    return [row for row, span in spans.items() if whole[span] != raw[span]]


def run(forks: Server, data: Path, out: Path, *more: str) -> tuple[int, dict, list[dict], str]:
    """A pretraining: its exit status, its samples by step, its lines, what it told."""
    seen = out.with_name(f"{out.name}-samples")
    seen.mkdir()
    prepare = [("together", "samples", {"folder": str(seen)})]
    [process] = together.start(forks, small.arguments("pretrain/run.py", out, data, *more), 1, prepare)
    return process.wait(), together.steps_of(seen), small.metrics(out), process.told()


def replaced(sound: dict, damaged: dict) -> tuple[Counter, int]:
    """How often each row was given in the sound run and not in the other; how often another one was, only there."""
    gone, new = Counter(), 0
    for step, samples in sound.items():
        mine, theirs = Counter(samples), Counter(damaged[step])
        gone.update(row for row, _ in (mine - theirs).elements())
        new += (theirs - mine).total()
    return gone, new


@pytest.mark.row("R7")
def test_a_run_goes_on_below_max_bad_and_stops_above_it(forks, tmp_path, figures):
    data, more = small.drawn(tmp_path, small.UNLABELED), ["schedules.epochs=1", "loader.workers=1"]
    sound = run(forks, data, tmp_path / "sound", *more)
    bad = damage(shutil.copytree(data, tmp_path / "set"), flipped, 2, 0)
    status, samples, lines, told = run(forks, tmp_path / "set", tmp_path / "run", *more, "loader.max_bad=0.016")
    assert (sound[0], status) == (0, 0), told
    gone, new = replaced(sound[1], samples)
    assert told.count("another sample takes its place") == len(bad) == 2
    lost, wrong = abs(lines[-1]["bad_samples"] - 2), len(gone.keys() ^ set(bad)) + abs(new - 2)
    figures("R7", injected="2 of 128 images damaged, in a run", times=2, lost=lost, wrong=wrong)
    assert (lost, wrong) == (0, 0)
    status, _, lines, told = run(forks, tmp_path / "set", tmp_path / "stopped", *more)
    assert status == 2
    assert "damaged samples among" in told
    assert f"more than loader.max_bad = {DEFAULT}" in told
    assert not (tmp_path / "stopped" / "teacher").exists()
    assert len(lines) < 8, "it does not wait for the end of the epoch"


@functools.cache
def _image(number: int) -> bytes:
    return crop(number)


def image(number: int) -> bytes:
    """One of 50 pictures, with its number behind it, so that the bytes of each are its own."""
    return _image(number % 50) + number.to_bytes(4)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A set of 4,000 small images."""
    folder = tmp_path_factory.mktemp("large") / "set"
    rows = [Record(f"{number:04}", "unlabeled", functools.partial(image, number)) for number in range(4000)]
    pack(rows, folder, PackingConfig(shard_samples=700, workers=0), ImagesConfig(), [{"name": "made"}])
    return folder


@pytest.fixture(scope="module")
def sound(large, forks, tmp_path_factory) -> dict:
    """The samples of a run on it, by step."""
    status, samples, _, told = run(forks, large, tmp_path_factory.mktemp("sound") / "run", *LARGE)
    assert status == 0, told
    return samples


@pytest.mark.soak
@pytest.mark.row("R7")
@pytest.mark.parametrize("how", [flipped, cut, zeroed])
def test_a_thousandth_may_be_lost(how, large, sound, forks, tmp_path, figures):
    """loader.max_bad as it is: 4 of 4,000 images an epoch are passed over; 5 stop the run."""
    lost = wrong = 0
    for seed in range(3):
        base = tmp_path / str(seed)
        base.mkdir()
        bad = damage(shutil.copytree(large, base / "set"), how, 4, seed)
        status, samples, lines, told = run(forks, base / "set", base / "damaged", *LARGE)
        assert status == 0, told
        gone, new = replaced(sound, samples)
        lost += abs(lines[-1]["bad_samples"] - len(bad)) + (len(bad) != 4)
        wrong += len(gone.keys() ^ set(bad)) + abs(new - len(bad))
        damage(shutil.copytree(large, base / "more"), how, 5, seed)
        status, _, _, told = run(forks, base / "more", base / "stopped", *LARGE)
        wrong += status != 2 or "5 damaged samples among" not in told
    note = "told as many as are damaged, all others as without; stopped at 5"
    injected = f"4 and 5 of 4,000 images {how.__name__}, in a run"
    figures("R7", injected=injected, times=6, lost=lost, wrong=wrong, note=note)
    assert (lost, wrong) == (0, 0)
