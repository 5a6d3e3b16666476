"""R21: packing that is killed at random instants, its processes with it, and started again: the bytes of one go."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import small
from writing import contents, crop

IMAGES = 400


def start(raw, out, workers: int) -> subprocess.Popen:
    command = [sys.executable, str(small.ROOT / "shards/build.py"), f"folder:{raw}", "--out", str(out)]
    settings = ["packing.shard_samples=7", f"packing.workers={workers}"]
    return subprocess.Popen(
        [*command, *settings],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=small.environment(PYTHONHASHSEED=str(workers)),
        start_new_session=True,
    )


def kill(process: subprocess.Popen, whole_group: bool) -> None:
    """SIGKILL to the process, and to its children or not; those must then end by themselves."""
    if whole_group:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


@pytest.mark.row("R21")
@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.soak)])
def test_killed_again_and_again(tmp_path, kills, figures):
    raw, out = tmp_path / "raw", tmp_path / "set"
    raw.mkdir()
    for number in range(IMAGES):
        (raw / f"{number:04}.jpg").write_bytes(crop(number))
    began = time.monotonic()
    assert start(raw, tmp_path / "whole", 0).wait(120) == 0
    length, chance, killed = time.monotonic() - began, random.Random(kills), 0
    for attempt in range(100 * kills):
        process = start(raw, out, chance.choice([0, 2]))
        try:
            process.wait(chance.uniform(0.3, 1.0) * length)
        except subprocess.TimeoutExpired:
            if killed < kills:
                kill(process, whole_group=bool(attempt % 2))
                killed += 1
                continue
            process.wait(120)
        assert process.returncode == 0
        if killed == kills:
            break
        for path in sorted(out.rglob("*"), reverse=True):  # too quick to be killed: from the start
            path.unlink()
        out.rmdir()
    ours, whole = contents(out), contents(tmp_path / "whole")
    lost, wrong = len(whole.keys() - ours.keys()), sum(whole.get(name) != data for name, data in ours.items())
    note = f"{len(whole)} tars, indexes, manifest: the bytes of one go; 0 and 2 processes, killed with it or left over"
    figures("R21", injected="SIGKILL while packing", times=killed, lost=lost, wrong=wrong, note=note)
    assert (lost, wrong) == (0, 0)
    assert killed == kills
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw", "set", "whole"]
