"""The parts that look after the processes of a run, each by itself; whole runs are in tests/reliability."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from types import SimpleNamespace

import pytest
import small
import torch
from torch import nn

from pretrain import ranks
from pretrain.heartbeats import Missing, Sign
from pretrain.ranks import EVALUATION, Ranks, RanksConfig, _behind
from pretrain.stopping import REQUEUE, STOPPED, Stops
from recipes.errors import Exit

HOSTS = ["a", "b", "c"]


def sign(rank: int, step: int, phase: str) -> Sign:
    return Sign(rank, HOSTS[rank], 100 + rank, step, phase, 9)


def test_of_processes_that_live_the_one_behind_is_named():
    told = _behind([sign(0, 7, "compute"), sign(1, 7, "data"), sign(2, 7, "compute")])
    assert told == "rank 1 on b (process 101) lives and is behind the others, at step 7, phase data"
    assert _behind([sign(0, 8, "data"), sign(1, 7, "compute")]).startswith("rank 1 on b")
    assert "look at the network" in _behind([sign(0, 7, "compute"), sign(1, 7, "compute")])


def test_a_signal_is_noted_while_a_state_can_be_saved_and_ends_the_process_before(handlers):
    with Stops() as stops:
        with pytest.raises(Exit, match="stopped by SIGUSR1; the same command goes on") as told:
            os.kill(os.getpid(), signal.SIGUSR1)
        assert told.value.code == REQUEUE == 75
    with Stops() as stops:
        stops.deferred = True
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stops.asked == signal.SIGUSR1
        stops.deferred = False
        os.kill(os.getpid(), signal.SIGTERM)  # a second one cuts nothing
        assert stops.asked == signal.SIGUSR1
    os.kill(os.getpid(), signal.SIGTERM)  # nor does one on the way out


def test_without_a_signal_all_is_as_before(handlers):
    with Stops():
        assert signal.getsignal(signal.SIGTERM) != handlers[signal.SIGTERM]
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    with Stops() as stops:
        stops.leave(for_good=True)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


def test_elsewhere_than_in_the_main_thread_signals_stay_as_they_are(handlers):
    seen = []

    def inside() -> None:
        with Stops():
            seen.append({number: signal.getsignal(number) for number in handlers})

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [handlers]


def test_a_worker_leaves_the_stop_to_its_parent(handlers):
    fork = multiprocessing.get_context("fork")
    with Stops():
        worker = fork.Process(target=time.sleep, args=(60,), daemon=True)
        worker.start()
    for number in ("TERM", "USR1", "TERM"):
        subprocess.run(["kill", f"-{number}", str(worker.pid)], check=True)  # a process that is not the parent
    worker.join(0.3)
    assert worker.exitcode is None
    worker.terminate()  # as multiprocessing does at the end, and then waits
    worker.join(30)
    assert worker.exitcode == 0
    plain = fork.Process(target=time.sleep, args=(60,), daemon=True)
    plain.start()
    plain.terminate()
    plain.join(30)
    assert plain.exitcode == -signal.SIGTERM, "outside of the block nothing changes"


def accelerator(rank: int = 0, world: int = 1, device: str = "cpu") -> SimpleNamespace:
    """What Ranks asks of one."""
    return SimpleNamespace(
        process_index=rank, num_processes=world, is_main_process=rank == 0, device=torch.device(device)
    )


def alone(out, **config: float) -> Ranks:
    return Ranks(RanksConfig(**config), accelerator(), out)


def test_one_process_stops_after_the_step_and_writes_it_down(tmp_path, handlers):
    (tmp_path / STOPPED).write_text("{}")
    with alone(tmp_path) as watched:
        assert (tmp_path / STOPPED).exists(), "the folder may be that of another process yet"
        for step, _ in enumerate(watched.waited_for(range(3)), start=1):
            assert step == 3 or not (tmp_path / STOPPED).exists(), "it belonged to the launch before"
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            assert watched.stop_after(step) == (step >= 2)
            if step == 2:
                assert str(watched.stopped()).startswith("stopped after step 2 by SIGTERM to process ")
                assert watched.stopped().code == REQUEUE
    note = small.json_of(tmp_path / STOPPED)
    assert (note["signal"], note["rank"], note["step"]) == ("SIGTERM", 0, 2)


def test_a_signal_in_the_last_step_ends_the_process_when_the_training_is_over(tmp_path, handlers):
    with alone(tmp_path) as watched:
        list(watched.waited_for(range(1)))
        watched.stop_after(1)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Exit, match="stopped by SIGTERM"):
            watched.done()


def test_the_clock_begins_with_the_training(tmp_path, handlers):
    watched, seen = alone(tmp_path, timeout_s=5.0), []
    watched.finished -= 3600  # a set was packed, a plan made

    def batches():
        seen.append(watched._late())  # what the watchdog asks while the first batch is awaited
        yield 0

    with watched:
        list(watched.waited_for(batches()))
    assert seen == [False]


def watch_until_exit(monkeypatch, tmp_path, answers: list[Missing]) -> list[int]:
    """Run the watchdog of rank 1 with these answers about the others; the exit codes."""
    watched, codes, answer = Ranks(RanksConfig(timeout_s=0.05), accelerator(1, 3), tmp_path), [], iter(answers)
    watched.ended, watched.stops.deferred, watched.step = threading.Event(), True, 4

    def leave(code: int) -> None:
        codes.append(code)
        watched.ended.set()

    def missing() -> Missing:
        found = next(answer, None)
        if found is None:
            watched.ended.set()
        return found or answers[-1]

    watched.beats = SimpleNamespace(missing=missing)
    monkeypatch.setattr(ranks.os, "_exit", leave)
    watched._watch()
    return codes


def test_the_watchdog_gives_up_and_names_who_is_behind(monkeypatch, tmp_path, capsys):
    alive = [sign(1, 4, "compute"), sign(2, 4, "data")]
    assert watch_until_exit(monkeypatch, tmp_path, [Missing([], alive)]) == [REQUEUE]
    told = capsys.readouterr().err
    assert told.startswith("error: no step for 0.05 s: rank 2 on c (process 102) lives and is behind the others")
    assert small.json_of(tmp_path / STOPPED)["lost"].startswith("rank 2 on c")


def test_the_watchdog_waits_for_an_evaluation(monkeypatch, tmp_path):
    alive = [sign(0, 4, EVALUATION), sign(1, 4, "compute")]
    assert watch_until_exit(monkeypatch, tmp_path, [Missing([], alive)] * 3) == []


def test_who_may_need_a_person_is_not_put_down_as_lost(monkeypatch, tmp_path):
    found = Missing(["rank 0 left with an error"], [sign(1, 4, "compute")], failed=True)
    assert watch_until_exit(monkeypatch, tmp_path, [found]) == [REQUEUE]
    assert not (tmp_path / STOPPED).exists(), "a job system must not take this for a reason to begin again"


def test_the_end_of_a_process_on_a_gpu_may_not_hang(monkeypatch, tmp_path, capsys):
    left = threading.Event()
    monkeypatch.setattr(ranks, "LEAVE_S", 0.01)
    monkeypatch.setattr(ranks.os, "_exit", lambda code: left.set())
    Ranks(RanksConfig(), accelerator(device="cpu"), tmp_path)._leave_soon("never said")
    Ranks(RanksConfig(), accelerator(device="cuda"), tmp_path)._leave_soon("rank 1 is gone")
    assert left.wait(10)
    assert capsys.readouterr().err == "rank 1 is gone\n"


def test_forward_passes_are_timed_and_those_of_a_gpu_when_it_is_through(tmp_path):
    watched, module = Ranks(RanksConfig(), accelerator(world=2), tmp_path), nn.Linear(1, 1)
    module.register_forward_hook(lambda *_: time.sleep(0.02))
    for _ in range(2):  # a second training of the same process
        watched.watch(module)
    start = time.perf_counter()
    module(torch.zeros(1, 1))
    assert 0.02 <= watched.times["compute"] <= time.perf_counter() - start
    ready = itertools.cycle([True, False])
    end = SimpleNamespace(query=lambda: next(ready))
    begin = SimpleNamespace(elapsed_time=lambda _: 250.0)  # milliseconds
    watched.times["compute"], watched.forwards = 0.0, [(begin, end)] * 2
    watched._read_events()
    assert (watched.times["compute"], len(watched.forwards)) == (0.25, 1)
