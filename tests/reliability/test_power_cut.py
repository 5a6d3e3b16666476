"""R1: a power cut at any point of a save, where only what was flushed is certain to be on disk.

A kill leaves the page cache alone, so it cannot show a missing fsync. Here every operation of a save is watched, and
after each of them the disk is rebuilt as a cut would leave it: files hold what they held when they were last flushed,
and are empty if they never were; of folders both extremes are tried, the names at their last flush and those of now.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import checkpoint, committed


class Disk:
    """What is certain to be on the disk below a folder, by inode."""

    def __init__(self, root: Path):
        self.root = root
        self.held: dict[int, int] = {}  # inode -> a handle, so that no inode is given out twice
        self.contents: dict[int, bytes] = {}  # of flushed files
        self.names: dict[int, dict[str, int]] = {}  # of flushed folders: name -> inode

    def look(self) -> None:
        """Hold all that is there now."""
        for path in (self.root, *self.root.rglob("*")):
            inode = path.stat().st_ino
            if inode not in self.held:
                self.held[inode] = os.open(path, os.O_RDONLY)

    def flushed(self, handle: int) -> None:
        """`handle` was given to fsync."""
        path, inode = Path(os.readlink(f"/proc/self/fd/{handle}")), os.fstat(handle).st_ino
        self.look()
        if path.is_dir():
            self.names[inode] = {entry.name: entry.inode() for entry in os.scandir(path)}
        else:
            self.contents[inode] = path.read_bytes()

    def _rebuild(self, inode: int, target: Path, now: bool) -> None:
        if not os.path.isdir(f"/proc/self/fd/{self.held[inode]}") and inode not in self.names:
            target.write_bytes(self.contents.get(inode, b""))
            return
        target.mkdir()
        there = self.names.get(inode, {})
        if now:
            here = self._path(inode)
            there = {entry.name: entry.inode() for entry in os.scandir(here)} if here else {}
        for name, inner in there.items():
            self._rebuild(inner, target / name, now)

    def _path(self, inode: int) -> Path | None:
        """Where an inode is now; None where it is deleted."""
        return next((p for p in (self.root, *self.root.rglob("*")) if p.stat().st_ino == inode), None)

    def after_a_cut(self, target: Path, now: bool) -> Path:
        """The folder as a cut leaves it. now: with the names that its folders have at this moment."""
        self.look()
        shutil.rmtree(target, ignore_errors=True)
        self._rebuild(self.root.stat().st_ino, target, now)
        return target

    def close(self) -> None:
        for handle in self.held.values():
            os.close(handle)


@pytest.fixture
def watched(monkeypatch, tmp_path) -> Iterator[Callable[[Path, Callable[[Path], None]], Disk]]:
    """`watched(root, check)`: from then on check(rebuilt folder) is called after each operation, for both extremes."""
    disks: list[Disk] = []

    def watch(root: Path, check: Callable[[Path], None]) -> Disk:
        disk, real = Disk(root), os.fsync
        disks.append(disk)
        handle = os.open(root, os.O_RDONLY)
        disk.flushed(handle)
        os.close(handle)
        busy: list[bool] = []

        def then(act: Callable[..., Any], flush: bool = False) -> Callable[..., Any]:
            def acting(*given: Any, **named: Any) -> Any:
                if busy:  # of an operation that is made of others, or of the check
                    return act(*given, **named)
                busy.append(True)
                try:
                    disk.look()
                    done = act(*given, **named)
                    if flush:
                        disk.flushed(given[0])
                    for now in (False, True):
                        check(disk.after_a_cut(tmp_path / "cut", now))
                    return done
                finally:
                    busy.clear()

            return acting

        monkeypatch.setattr(os, "fsync", then(real, flush=True))
        monkeypatch.setattr(Path, "rename", then(Path.rename))
        monkeypatch.setattr(Path, "mkdir", then(Path.mkdir))
        monkeypatch.setattr(shutil, "rmtree", then(shutil.rmtree))
        monkeypatch.setattr(committed, "save_file", then(committed.save_file))
        return disk

    yield watch
    for disk in disks:
        disk.close()


def tensors(number: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((64, 64), float(number)), "bias": torch.arange(number + 1.0)}


def same(folder: Path, file: str, number: int) -> bool:
    found, expected = checkpoint.load_file(folder / file), tensors(number)
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.row("R1")
def test_states(watched, tmp_path, figures):
    root, done, cuts = tmp_path / "run", [-1], []
    root.mkdir()

    def check(cut: Path) -> None:
        state = checkpoint.newest_sound(cut / "checkpoints")
        assert state is not None or done[0] < 0
        if state is not None:
            number = checkpoint.check_state(state)["samples"]
            assert number >= done[0], "a save that was over is lost"
            assert same(state, checkpoint.TENSORS, number), "a wrong bit"
        cuts.append(cut)

    watched(root, check)
    for number in range(5):
        checkpoint.write_state(root / "checkpoints", tensors(number), number, 2, {})
        done[0] = number
    figures("R1", injected="power cut after an operation of a save", times=len(cuts), lost=0, wrong=0)
    assert len(cuts) >= 5 * 2 * 6


@pytest.mark.row("R1")
def test_a_model_that_is_replaced(watched, tmp_path):
    """Whoever reads it has the one before or the new one; between two renames `recover` brings the one before back."""
    root, done = tmp_path / "run", [-1]
    root.mkdir()

    def check(cut: Path) -> None:
        committed.recover(cut / "teacher")
        assert (cut / "teacher").exists() or done[0] < 0
        if (cut / "teacher").exists():
            facts = committed.read_facts(cut / "teacher" / checkpoint.CONFIG, sealed=False)
            committed.check_files(cut / "teacher", facts)
            assert facts["number"] >= done[0]
            assert same(cut / "teacher", checkpoint.WEIGHTS, facts["number"])

    watched(root, check)
    for number in range(3):
        checkpoint.save_model(root / "teacher", tensors(number), {"number": number})
        done[0] = number
    assert [path.name for path in root.iterdir()] == ["teacher"]


@pytest.mark.parametrize("forgotten", ["file", "parent"])
def test_a_save_that_does_not_flush_is_found(forgotten, watched, tmp_path, monkeypatch):
    """What the tests above rest on: without one of its flushes, a save is lost or wrong after some cut."""
    folder, done, faults = tmp_path / "checkpoints", [-1], []
    folder.mkdir()

    def check(cut: Path) -> None:
        try:
            state = checkpoint.newest_sound(cut)
            number = -1 if state is None else checkpoint.check_state(state)["samples"]
        except checkpoint.UserError:
            number = -1
        faults.extend([number] if number < done[0] else [])

    watched(folder, check)
    flush = committed._fsync

    def forgetful(path: Path) -> None:
        if not (path.name == checkpoint.TENSORS if forgotten == "file" else path == folder):
            flush(path)

    monkeypatch.setattr(committed, "_fsync", forgetful)
    for number in range(4):
        checkpoint.write_state(folder, tensors(number), number, 2, {})
        done[0] = number
    assert faults
