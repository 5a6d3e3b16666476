"""Signs of life of three processes, all played by this one."""

import os
import threading

import pytest
import small
import torch.distributed as dist

from pretrain import heartbeats
from pretrain.heartbeats import FAILED, Heartbeats, Missing

HOSTS = ["a", "b", "c"]


@pytest.fixture
def lives(monkeypatch):
    """Makes the signs of rank `rank` of three, in a store that the test holds; beats of 50 ms."""
    store = dist.TCPStore("127.0.0.1", int(small.free_port()), is_master=True)
    monkeypatch.setattr(heartbeats, "_get_default_store", lambda: store)
    made = []

    def make(rank: int) -> Heartbeats:
        made.append(Heartbeats(rank, 3, 0.05))
        made[-1].host = HOSTS[rank]
        made[-1].start()
        return made[-1]

    yield make
    for beats in made:
        beats.stop()


def test_who_gives_no_sign_is_missing(lives):
    me, other = lives(0), lives(1)
    assert me.missing().gone == ["rank 2 never gave a sign of life"]
    third = lives(2)
    assert me.missing().gone == []
    assert [alive.rank for alive in me.missing().alive] == [0, 1, 2]
    third.step, third.phase = 12, "data"
    third._tell()
    third.ending.set()  # as if it were killed
    third.thread.join()
    pid = os.getpid()
    expected = f"rank 2 on c (process {pid}) gives no sign of life, the last was at step 12, phase data"
    found = me.missing()
    assert (found.gone, [alive.rank for alive in found.alive], found.failed) == ([expected], [0, 1], False)
    assert other.missing().gone == [expected]


def test_who_left_is_missing_only_if_it_failed(lives):
    me, other, third = lives(0), lives(1), lives(2)
    other.stop()
    assert me.missing().gone == []
    assert [alive.rank for alive in me.missing().alive] == [0, 2]
    third.step = 5
    third.stop(failed=True)
    found = me.missing()
    assert found.gone == [f"rank 2 on c (process {os.getpid()}) left with an error after step 5: its message says why"]
    assert found.failed
    assert third.phase == FAILED


def test_a_store_that_does_not_answer_is_that_of_a_lost_host(lives, monkeypatch):
    me, waiting = lives(1), threading.Event()
    monkeypatch.setattr(heartbeats, "READ_S", 0.1)
    monkeypatch.setattr(me, "_read", waiting.wait)
    assert me.missing() == Missing(["rank 0, in whose process or on whose host the processes met, is gone"], [])
    waiting.set()
