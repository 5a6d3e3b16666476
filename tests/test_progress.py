"""Progress: the clock, the rate, and one line now and then where there is no terminal."""

import sys

import pytest

from recipes import progress
from recipes.progress import Meter, clock, track


@pytest.fixture
def now(monkeypatch):
    """A clock that the test turns by hand: now[0] is the time in seconds."""
    hand = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: hand[0])
    return hand


@pytest.mark.parametrize(
    "seconds, text", [(0, "0:00"), (59.4, "0:59"), (59.5, "1:00"), (61, "1:01"), (3599, "59:59"), (3723, "1:02:03")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_track_gives_every_item_in_order(capsys):
    assert list(track(iter("abc"), total=3, label="reading")) == ["a", "b", "c"]
    assert capsys.readouterr().out == ""  # stdout belongs to results


def test_one_line_every_five_seconds_and_one_at_the_end(now, capsys):
    for _ in track(range(12), total=12, label="packing"):
        now[0] += 1
    told = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in told] == ["5/12", "10/12", "12/12"]
    assert told[0] == "packing 5/12  1 images/s  0:07 left"


def test_the_rate_counts_from_where_this_run_began(now, capsys):
    with Meter(total=100, label="train", unit="steps", start=80) as meter:
        now[0] += 5
        meter.advance(10, note="loss 9.01")
        assert meter.rate == pytest.approx(2.0)
        assert meter.done == 90
    assert capsys.readouterr().err.splitlines()[0] == "train 90/100  2 steps/s  0:05 left  loss 9.01"


def test_a_note_stays_until_the_next(now, capsys):
    with Meter(total=4, label="train") as meter:
        meter.advance(note="loss 3")
        now[0] += 6
        meter.advance()
    assert "loss 3" in capsys.readouterr().err


def test_a_silent_meter_says_nothing(now, capsys):
    with Meter(total=3, label="train", silent=True) as meter:
        for _ in range(3):
            now[0] += 60
            meter.advance()
    assert capsys.readouterr().err == ""
    assert meter.done == 3


def test_nothing_done_nothing_said(capsys):
    with Meter(total=3, label="train"):
        pass
    assert list(track([], total=0, label="empty")) == []
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Meter(total=2, label="train") as meter:
        meter.advance(2, note="loss 1")
        assert meter.bar is not None
        assert meter.bar.finished
