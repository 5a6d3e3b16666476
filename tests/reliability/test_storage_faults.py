"""Storage that fails a run in other ways than by being full: two at one folder, shards and folders that vanish."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import killing
import pytest
import small
from forked import Run, Server

JOURNAL = "pretrain.journal"
SETTINGS = ["schedules.epochs=3", "checkpoint.every_epochs=1"]  # 24 steps


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    return small.drawn(tmp_path_factory.getbasetemp(), small.UNLABELED)


@pytest.fixture
def own(crops, tmp_path):
    """A copy of the crops that may be damaged: shards of 50, 50 and 28 samples."""
    return Path(shutil.copytree(crops, tmp_path / "own"))


def pretrain(forks: Server, out: Path, data: Path, *more: str, prepare=()) -> Run:
    return forks.start(small.arguments("pretrain/run.py", out, data, *SETTINGS, *more), list(prepare))


def last_line(run: Run) -> str:
    return [line for line in run.told().splitlines() if "images/s" not in line][-1]


@pytest.mark.parametrize("script", ["pretrain/run.py", "finetune/run.py"])
def test_of_two_starts_on_one_run_folder_one_is_refused_and_told_by_whom(forks, crops, tmp_path, script):
    given = [*SETTINGS, "schedules.epochs=20"] if script.startswith("pretrain") else ["optim.epochs=20"]
    data = crops if script.startswith("pretrain") else small.drawn(crops.parent, small.LABELLED)
    command = small.arguments(script, tmp_path / "run", data, *given, ckpt="none" if "fine" in script else None)
    runs = [forks.start(command, [("full_disks", "impatient", {})]) for _ in range(2)]
    end = time.monotonic() + 60
    while all(run.poll() is None for run in runs):  # the refused one ends first
        assert time.monotonic() < end
        time.sleep(0.01)
    refused, owner = sorted(runs, key=lambda run: run.poll() is None)
    assert refused.wait() == 2, refused.told()
    sentence = last_line(refused)
    assert f"error: another process is at work in the run folder {tmp_path / 'run'}: " in sentence
    assert f"process {owner.pid} on {os.uname().nodename}, since " in sentence or "did not tell its name" in sentence
    assert sentence.endswith("; wait for it, stop it, or choose another --out")
    owner.kill()
    again = forks.start(command, [("full_disks", "impatient", {})])  # at once, whatever the killed one left
    assert killing.until(again, lambda: f'"pid": {again.pid},' in (tmp_path / "run" / ".lock").read_text())
    again.kill()


@pytest.mark.soak
def test_two_packings_of_one_set_at_the_same_moment_make_it_once(tmp_path):
    command = [sys.executable, str(small.ROOT / "shards/build.py"), "--recipe", "recipes/shards/smoke.yaml"]
    command += ["--out", str(tmp_path / "set")]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=small.ROOT)
        for _ in range(2)
    ]
    told = [process.communicate(timeout=60) for process in started]
    codes = sorted(process.returncode for process in started)
    if codes == [0, 2]:
        refused = next(text for process, (_, text) in zip(started, told, strict=True) if process.returncode)
        assert re.search(r"another process is packing .*/set at this moment: process \d+ on ", refused)
    else:
        assert codes == [0, 0], told
        assert sum("already holds this set; nothing to do" in text for text, _ in told) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.soak), 2])
def test_a_shard_that_vanishes_is_named_and_nobody_hangs(forks, own, tmp_path, workers):
    shard = sorted(own.glob("*.tar"))[1]
    gone = ("full_disks", "vanish_when_open", {"path": str(shard)})
    run = pretrain(forks, tmp_path / "run", own, f"loader.workers={workers}", prepare=[gone])
    assert run.wait(30) == 2, run.told()
    assert last_line(run) == (
        f"error: cannot open shard {shard}: No such file or directory; fetch it or pack the set again"
    )
    assert run.gone(10), "no worker is left"


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.soak), 2])
def test_a_shard_that_is_cut_while_it_is_read(forks, own, tmp_path, workers):
    """Its samples are replaced and counted; above loader.max_bad the run stops."""
    shard = sorted(own.glob("*.tar"))[0]
    cut = ("full_disks", "cut_short", {"path": str(shard), "module": JOURNAL, "step": 2})
    given = [f"loader.workers={workers}", "loader.prefetch=1"]
    run = pretrain(forks, tmp_path / "strict", own, *given, "loader.max_bad=0.01", prepare=[cut])
    assert run.wait(30) == 2, run.told()
    assert "more than loader.max_bad = 0.01" in last_line(run)
    assert run.gone(10)
    small.drawn(own.parent, small.UNLABELED)
    shutil.copy(small.drawn(own.parent, small.UNLABELED) / shard.name, shard)
    run = pretrain(forks, tmp_path / "lenient", own, *given, "loader.max_bad=1.0", prepare=[cut])
    assert run.wait(30) == 0, run.told()
    counted = [line["bad_samples"] for line in small.metrics(tmp_path / "lenient")]
    assert counted[0] == 0
    assert 40 < counted[-1] <= 3 * 25, "some 25 samples are behind the cut, read in nearly three epochs"


def test_a_run_folder_that_vanishes_is_told(forks, crops, tmp_path):
    gone = ("full_disks", "vanish", {"path": str(tmp_path / "run"), "module": JOURNAL, "step": 3})
    run = pretrain(forks, tmp_path / "run", crops, prepare=[gone])
    assert run.wait(30) == 2, run.told()
    assert last_line(run) == f"error: {tmp_path / 'run'} has vanished while it was being written to"
