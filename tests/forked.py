"""Entry scripts run in forks of a process that has imported everything, so that fifty starts cost seconds.

    with forked.Server(folder) as server:
        run = server.start(["pretrain/run.py", "--out", ...], prepare=[["kill_points", "arm", {...}]])
        run.kill()                    # SIGKILL to it and its loader workers
        assert server.start([...]).wait() == 0

Each run is a process of its own with a group of its own, made by `fork` before any thread exists; it ends as an
interpreter does. tests/reliability/test_many_kills.py holds that it computes the bits of a fresh process.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("pretrain/run.py", "finetune/run.py")
LATER = ("torch.utils.tensorboard", "torch._dynamo", "torch.utils.data._utils.worker")  # what they import on the way
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
PATIENCE_S = 120.0
Prepare = list[tuple[str, str, dict[str, Any]]]  # module of tests/, function, its arguments: called before the script


def in_group(group: int) -> list[int]:
    """The processes of a group that are alive."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of = stat.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue  # it ended meanwhile
        if int(of) == group and state not in "ZX":
            found.append(int(stat.parent.name))
    return found


class Run:
    """One run of an entry script."""

    def __init__(self, server: "Server", pid: int, output: Path):
        self.server, self.pid, self.output = server, pid, output
        self.status: int | None = None

    def poll(self) -> int | None:
        """The exit status, minus the signal where one ended it; None while it runs."""
        if self.status is None:
            self.status = self.server.ask({"poll": self.pid})
        return self.status

    def wait(self, seconds: float = PATIENCE_S) -> int:
        """`poll` when it has ended; AssertionError with what it told after so long."""
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                raise AssertionError(f"not done after {seconds} s:\n{self.told()}")
            time.sleep(0.005)
        return self.status

    def send(self, number: int) -> None:
        """A signal to the script's own process."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self, workers: bool = True) -> int:
        """SIGKILL, to its loader workers as well or not; the exit status, which may be that of an end before it."""
        if self.poll() is None:
            (os.killpg if workers else os.kill)(self.pid, signal.SIGKILL)
        return self.wait()

    def gone(self, seconds: float = 30.0) -> bool:
        """Whether all of its processes end within so long."""
        end = time.monotonic() + seconds
        while in_group(self.pid) and time.monotonic() < end:
            time.sleep(0.01)
        return not in_group(self.pid)

    def told(self) -> str:
        """What it wrote to the screen."""
        return self.output.read_text(errors="replace").partition("nanobind: leaked")[0]  # of what the server imported


class Server:
    """The process that forks the runs. folder: for what they write to the screen."""

    def __init__(self, folder: Path):
        self.folder, self.runs = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **ONE_THREAD},
            start_new_session=True,
        )

    def ask(self, request: dict[str, Any]) -> Any:
        """The server's answer."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the server of the forks has died"
        return json.loads(answer)

    def start(self, command: list[str], prepare: Prepare = (), **variables: str) -> Run:
        """Run an entry script with its arguments, as small.arguments gives them. variables: of the environment."""
        self.runs += 1
        output = self.folder / f"run-{self.runs}.txt"
        request = {"command": list(map(str, command)), "output": str(output), "prepare": list(prepare)}
        return Run(self, self.ask({**request, "variables": variables}), output)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()  # it kills what still runs, and ends
        self.process.wait(PATIENCE_S)
        self.process.stdout.close()


def _become(request: dict[str, Any], reply: int) -> NoReturn:
    """What the forked child does: the script, as an interpreter of its own would."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts with `&` ignore it
    for number in (0, reply):
        os.close(number)
    os.open(os.devnull, os.O_RDONLY)
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(request["variables"])
    sys.argv = request["command"]
    for module, function, given in request["prepare"]:
        getattr(importlib.import_module(module), function)(**given)
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.exit(0)


def _poll(pid: int) -> int | None:
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def serve() -> None:
    """Answer requests until there are no more; in the forked child, run the script."""
    reply = os.dup(1)
    os.dup2(2, 1)
    for script in SCRIPTS:
        runpy.run_path(str(ROOT / script), run_name="imported")  # all that it imports
    for module in LATER:
        importlib.import_module(module)
    gc.freeze()  # else each fork copies all of it at its first collection
    running: set[int] = set()
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "poll" in request:
            answer = _poll(request["poll"])
            running -= {request["poll"]} if answer is not None else set()
        else:
            assert len(os.listdir("/proc/self/task")) == 1, "a fork of several threads may hang"
            answer = os.fork()
            if not answer:
                _become(request, reply)
            running.add(answer)
        os.write(reply, (json.dumps(answer) + "\n").encode())
    for pid in running:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    os._exit(0)


if __name__ == "__main__":
    try:
        serve()
    except Exception:
        traceback.print_exc()  # to the output of the run, if this is one
        sys.exit(1)
