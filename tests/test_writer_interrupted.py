"""Packing that stops half-way: nothing is lost, nothing is half there, the next run gives the same bytes."""

import fcntl
import shutil
import signal
import subprocess
import sys
import time

import pytest
from writing import contents, crop, interrupt_at, made_rows, planned, run

from recipes.errors import UserError
from shards import writer
from shards.tars import PARTS


@pytest.fixture
def made(tmp_path):
    return made_rows(tmp_path)


def test_interrupted_and_continued(tmp_path, made, capsys):
    run(made, tmp_path / "whole")
    last = planned(made, tmp_path)[0][4][2][3].key
    with pytest.raises(KeyboardInterrupt):
        run(interrupt_at(made, [row.key for row in made].index(last)), tmp_path / "set")
    assert not (tmp_path / "set").exists()
    partial = tmp_path / "set.partial"
    kept = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.tar")}
    assert len(kept) == 4
    (partial / "train-000001.tar").write_bytes(b"short")  # not as long as its marker says: written again
    run(made, tmp_path / "set")
    assert "continuing an interrupted run: 3 of 10 tars" in capsys.readouterr().out
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")
    assert (tmp_path / "set" / "train-000000.tar").stat().st_mtime_ns == kept["train-000000.tar"]


def test_partial_of_another_plan_is_not_continued(tmp_path, made):
    run(made, tmp_path / "whole", seed=1)
    with pytest.raises(KeyboardInterrupt):
        run(interrupt_at(made, 20), tmp_path / "set")
    run(made, tmp_path / "set", seed=1)
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


@pytest.mark.row("R21")
def test_killed_with_its_processes_and_continued(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    for i in range(160):
        (raw / f"{i:03}.jpg").write_bytes(crop(i))
    program = (
        "from pathlib import Path; from shards.assembly import build_set; from shards.images import ImagesConfig; "
        "from shards.packing import PackingConfig\n"
        "if __name__ == '__main__':\n"
        "    build_set([{'name': 'folder', 'path': 'raw'}], 'OUT', PackingConfig(shard_samples=2, workers=W), "
        "ImagesConfig())\n"
    )

    def start(out, workers):
        script = tmp_path / f"{out}.py"
        script.write_text(program.replace("OUT", out).replace("W)", f"{workers})"))
        return subprocess.Popen([sys.executable, script], cwd=tmp_path, stderr=subprocess.DEVNULL)

    victim, whole = start("set", 2), start("whole", 0)
    partial = tmp_path / "set.partial"
    while len(list(partial.glob("*.tar"))) < 5:
        assert victim.poll() is None, "killed too late to test anything"
        time.sleep(0.002)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not (tmp_path / "set").exists()
    assert whole.wait(60) == 0
    assert start("set", 0).wait(60) == 0
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")
    assert not partial.exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_image_leaves_nothing(tmp_path, made, workers):
    bad = tmp_path / "raw" / "020"
    bad.write_bytes(crop(20)[:-30])
    with pytest.raises(UserError, match=r"raw/020 is a damaged or truncated JPEG image.*images\.on_bad=skip"):
        run(made, tmp_path / "set", workers=workers, shard_samples=50)
    assert not (tmp_path / "set").exists()
    if workers == 0:  # else another process may have finished a tar, which is kept
        assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_finished_tars_survive_a_bad_image(tmp_path, made):
    run(made, tmp_path / "whole")
    key = planned(made, tmp_path)[0][5][2][0].key
    bad = tmp_path / "raw" / key[-3:]
    good = bad.read_bytes()
    bad.write_bytes(b"hello")
    with pytest.raises(UserError, match=r"\(5 finished tars are kept, the same command continues\)"):
        run(made, tmp_path / "set")
    assert not (tmp_path / "set").exists()
    bad.write_bytes(good)
    run(made, tmp_path / "set")
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_a_source_that_fails_leaves_what_was_done(tmp_path, made):
    """Hours of packing are not deleted because a disk was not mounted on the second try."""

    def broken():
        yield made[0]
        raise UserError("the disk is gone")

    with pytest.raises(KeyboardInterrupt):
        run(
            interrupt_at(made, [row.key for row in made].index(planned(made, tmp_path)[0][3][2][0].key)),
            tmp_path / "set",
        )
    kept = sorted(path.name for path in (tmp_path / "set.partial").glob("*.tar"))
    assert len(kept) == 3
    with pytest.raises(UserError, match="the disk is gone"):
        run(broken(), tmp_path / "set")
    assert sorted(path.name for path in (tmp_path / "set.partial").glob("*.tar")) == kept
    with pytest.raises(UserError, match="the disk is gone"):
        run(broken(), tmp_path / "other")
    assert not (tmp_path / "other.partial").exists()


def test_two_processes_do_not_pack_one_set(tmp_path, made):
    parts = tmp_path / "set.partial" / PARTS
    parts.mkdir(parents=True)
    with (parts / writer.LOCK).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"another process is packing .*set at this moment"):
            run(made, tmp_path / "set")
    assert (parts / writer.LOCK).exists()
    run(made, tmp_path / "set")


def test_a_disk_that_is_too_small_is_told_first(tmp_path, made, monkeypatch):
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 0, 20_000))
    with pytest.raises(
        UserError, match=r"the set needs about 0\.0 GB \(66 images of 0\.\d kB\), but only 0\.0 GB are free in "
    ):
        run(made, tmp_path / "set")
    assert not (tmp_path / "set.partial").exists()
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 0, 900_000))
    run(made, tmp_path / "set")


def test_a_folder_in_the_way_is_not_deleted(tmp_path, made):
    (tmp_path / "set.partial").mkdir()
    (tmp_path / "set.partial" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"set\.partial is in the way"):
        run(made, tmp_path / "set")
    assert (tmp_path / "set.partial" / "thesis.txt").exists()


def test_a_tar_is_written_while_its_name_is_not_there(tmp_path, made, monkeypatch):
    """A crash before the rename leaves no tar under its final name, and the next run does not trust leftovers."""
    with pytest.raises(KeyboardInterrupt):
        run(interrupt_at(made, 0), tmp_path / "set", shard_samples=50)
    partial = tmp_path / "set.partial"
    assert not list(partial.glob("*.tar"))
    assert list((partial / PARTS).glob("train-000000.tar.*")), "the unfinished tar lies among the parts"
    run(made, tmp_path / "set", shard_samples=50)
    assert not (tmp_path / "set" / PARTS).exists()
