"""Only one process at a time: real processes, killed and started at the same moment; the owner is named."""

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from small import ROOT

from recipes import locks
from recipes.errors import UserError

# one that holds the lock, says so, and ends when its input does; `more` runs while it holds it
HOLDER = """
import os, subprocess, sys, time
from pathlib import Path
from recipes import locks
from recipes.errors import UserError
locks.PATIENCE_S = float(sys.argv[2])
try:
    with locks.holding(Path(sys.argv[1]), "another one is at work", "wait for it", {inherited}):
        {more}
        print("held", os.getpid(), flush=True)
        sys.stdin.read()
except UserError as error:
    print(error, flush=True)
"""


class Holder:
    """A process that tries to hold the lock. told: "held PID", or why not."""

    def __init__(self, path: Path, patience_s: float = 0.0, more: str = "pass", inherited: bool = False):
        code = HOLDER.format(more=more, inherited=inherited)
        command = [sys.executable, "-c", code, str(path), str(patience_s)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    @property
    def told(self) -> str:
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait(20)
        self.process.stdout.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(20)
        self.process.stdin.close()
        self.process.stdout.close()


def told(path: Path) -> str:
    """What another process is told that asks for the lock."""
    holder = Holder(path)
    answer = holder.told
    holder.end()
    return answer


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE_S", 0.0)


def test_the_second_is_refused_with_the_owner_s_name(tmp_path, impatient):
    owner = Holder(tmp_path / "run" / ".lock")
    assert owner.told == f"held {owner.process.pid}"
    named = rf"^it is busy: process {owner.process.pid} on {re.escape(socket.gethostname())}, since 20\d\d-.*T.* \(.*"
    for take in (locks.keep, lambda *given: locks.holding(*given).__enter__()):
        with pytest.raises(UserError, match=named + r"run/\.lock.*\); go away$"):
            take(tmp_path / "run" / ".lock", "it is busy", "go away")
    owner.end()
    with locks.holding(tmp_path / "run" / ".lock", "it is busy", "go away"):
        assert f'"pid": {os.getpid()},' in (tmp_path / "run" / ".lock").read_text()


def test_a_kill_frees_it_at_once_though_forked_workers_live_on(tmp_path):
    """What a loader's workers do: they outlive a SIGKILL of the process that forked them by seconds."""
    owner = Holder(
        tmp_path / ".lock", more="pid = os.fork()\n        if not pid: time.sleep(60)\n        print(pid, flush=True)"
    )
    worker = int(owner.told)
    try:
        assert owner.told.startswith("held")
        owner.kill()
        os.kill(worker, 0)  # it lives
        began = time.monotonic()
        with locks.holding(tmp_path / ".lock", "busy", "wait"):
            assert time.monotonic() - began < 1
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_child_that_inherits_it_on_purpose_holds_on(tmp_path, impatient):
    owner = Holder(
        tmp_path / ".lock",
        more="print(subprocess.Popen(['sleep', '60'], close_fds=False).pid, flush=True)",
        inherited=True,
    )
    child = int(owner.told)
    try:
        assert owner.told.startswith("held")
        owner.kill()
        with (
            pytest.raises(UserError, match=f"busy: process {owner.process.pid} on "),
            locks.holding(tmp_path / ".lock", "busy", "wait"),
        ):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
    time.sleep(0.1)
    locks.keep(tmp_path / ".lock", "busy", "wait")
    locks.drop(tmp_path / ".lock")


def test_of_those_that_start_at_the_same_moment_one_gets_it(tmp_path):
    for number in range(4):
        path = tmp_path / str(number) / ".lock"
        holders = [Holder(path) for _ in range(3)]
        told = [holder.told for holder in holders]
        held = [int(line.split()[1]) for line in told if line.startswith("held")]
        assert len(held) == 1, told
        refused = [line for line in told if not line.startswith("held")]
        # who comes between the lock and its text is told so
        assert all(f"process {held[0]} on " in line or "did not tell its name" in line for line in refused), told
        for holder in holders:
            holder.end()


def test_who_comes_while_the_owner_ends_waits_a_moment(tmp_path):
    owner = Holder(tmp_path / ".lock")
    assert owner.told.startswith("held")
    threading.Timer(0.3, owner.end).start()
    with locks.holding(tmp_path / ".lock", "busy", "wait"):
        assert owner.process.wait(20) == 0


def test_a_file_that_its_owner_deletes_is_not_the_lock(tmp_path):
    """The folder of parts goes with its lock when a set is packed; who waited for it begins a new one."""
    path = tmp_path / "parts" / ".lock"
    owner = Holder(path, more="time.sleep(0.3); os.unlink(sys.argv[1]); os.rmdir(os.path.dirname(sys.argv[1]))")
    while not path.exists():
        time.sleep(0.01)
    with locks.holding(path, "busy", "wait"):
        assert f'"pid": {os.getpid()},' in path.read_text()
    owner.end()


def test_the_process_may_ask_again_for_what_it_keeps(tmp_path, impatient):
    path = tmp_path / ".lock"
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        locks.keep(path, "busy", "wait")
    path.unlink()
    locks.keep(path, "busy", "wait")  # the one that others would meet now
    assert told(path).startswith("another one is at work: process ")
    locks.drop(path)
    locks.drop(path)
    assert told(path).startswith("held")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', '{"pid": 1e999}', "[" * 4000, "\x00\xff", "9" * 5000])
def test_a_lock_file_without_a_readable_owner(tmp_path, impatient, text):
    with locks.holding(tmp_path / ".lock", "busy", "wait"):
        (tmp_path / ".lock").write_text(text)
        with (
            pytest.raises(UserError, match="busy: a process that did not tell its name; wait"),
            locks.holding(tmp_path / ".lock", "busy", "wait"),
        ):
            pass


def test_the_owner_s_text_cannot_command_the_terminal(tmp_path, impatient):
    with locks.holding(tmp_path / ".lock", "busy", "wait"):
        text = '{"pid": 1, "host": "\\u001b[2Jhost", "started": "\\nnow", "command": "' + "x" * 900 + '"}'
        (tmp_path / ".lock").write_text(text)
        with pytest.raises(UserError) as caught, locks.holding(tmp_path / ".lock", "busy", "wait"):
            pass
    assert str(caught.value) == f"busy: process 1 on ?[2Jhost, since ?now ({'x' * 200}...); wait"


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.fcntl, "flock", none)
    with locks.holding(tmp_path / ".lock", "busy", "wait"):
        assert "has no locks (No locks available)" in capsys.readouterr().err


def test_a_lock_that_cannot_be_signed_is_given_back(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(locks.os, "pwrite", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*\.lock'"):
            locks.keep(tmp_path / ".lock", "busy", "wait")
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        locks.keep(tmp_path / "file" / ".lock", "busy", "wait")
    assert len(os.listdir("/proc/self/fd")) == before
    assert told(tmp_path / ".lock").startswith("held")
