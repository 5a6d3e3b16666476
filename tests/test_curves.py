"""Curves as SVG: thinned without losing a spike, round ticks, and every value at its place."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune import curves
from finetune.curves import BOTTOM, BUCKETS, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, Level, Line, Mark, draw, thinned


def line(y, x=None, **how) -> Line:
    y = np.asarray(y, np.float64)
    return Line("loss", np.arange(len(y), dtype=np.float64) if x is None else np.asarray(x, np.float64), y, **how)


def points(d: str) -> np.ndarray:
    return np.array([[float(v) for v in pair.split()] for pair in re.findall(r"-?[\d.]+ -?[\d.]+", d)])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 3000), st.floats(0, 0.5))
def test_thinning_is_that_of_a_loop(seed, count, missing):
    random = np.random.default_rng(seed)
    x = np.cumsum(random.integers(1, 9, count)).astype(np.float64)
    y = np.where(random.random(count) < missing, np.nan, random.normal(size=count))
    found = thinned(x, y)
    if count <= 2 * BUCKETS or x[0] == x[-1]:
        assert found.x is x
        return
    part = np.minimum((x - x[0]) / (x[-1] - x[0]) * BUCKETS, BUCKETS - 1).astype(int)
    for i, bucket in enumerate(np.unique(part)):
        own, known = part == bucket, (part == bucket) & np.isfinite(y)
        assert found.x[i] == pytest.approx(x[own].mean())
        if known.any():
            assert (found.low[i], found.high[i]) == (y[known].min(), y[known].max())
            assert found.mean[i] == pytest.approx(y[known].mean())
        else:
            assert np.isnan(found.mean[i])


def test_a_spike_of_one_step_is_in_the_band():
    y = np.ones(100_000)
    y[54_321] = 90.0
    drawn = draw(Chart("loss", [line(y)]))
    assert points(drawn.paths[0].band)[:, 1].min() < TOP + 12, "near the top"
    assert "largest 90" in drawn.summary


def test_values_lie_where_they_should():
    drawn = draw(Chart("loss", [line([0.0, 10.0, 5.0])], zero=True))
    (path,) = drawn.paths
    found = points(path.line)
    np.testing.assert_allclose(found[:, 0], [LEFT, (LEFT + WIDTH - RIGHT) / 2, WIDTH - RIGHT], atol=0.1)
    zero, most, middle = found[:, 1]
    assert zero == HEIGHT - BOTTOM
    assert TOP < most < middle < zero
    assert middle == pytest.approx((most + zero) / 2, abs=0.2)
    assert drawn.y_ticks[0].text == "0"


def test_a_gap_breaks_the_line_and_nothing_is_no_chart():
    drawn = draw(Chart("loss", [line([1.0, np.nan, 2.0, 3.0])]))
    assert drawn.paths[0].line.count("M") == 2
    assert draw(Chart("loss", [line([np.nan])])) is None
    assert draw(Chart("loss", [])) is None
    assert draw(Chart("loss", [line([7.0, 7.0, 7.0])])).paths, "a constant has a range, too"
    assert draw(Chart("loss", [line([7.0])])).paths


@pytest.mark.parametrize(("low", "high", "expected"), [
    (0, 10, [0, 2.5, 5, 7.5, 10]), (0.1, 0.9, [0.2, 0.4, 0.6, 0.8]), (-3, 3, [-2, 0, 2]),
    (4.8, 5.6, [4.8, 5, 5.2, 5.4, 5.6]),
])  # fmt: skip
def test_ticks_are_round(low, high, expected):
    assert curves.ticks(low, high, 4) == pytest.approx(expected)


def test_ticks_of_a_logarithmic_axis():
    assert curves.log_ticks(0.5, 2000, 5) == [1, 10, 100, 1000]
    assert curves.log_ticks(0.5, 2000, 4) == [10, 1000]
    assert curves.log_ticks(2, 60, 4) == [2, 5, 10, 20, 50]


def test_a_long_tail_is_logarithmic_only_where_it_is_allowed():
    y = [1.0] * 50 + [1000.0]
    plain, log = (draw(Chart("loss", [line(y)], log=allowed)) for allowed in (False, True))
    assert plain.axes.endswith(" 0")
    assert log.axes.endswith(" 1")


def test_marks_and_levels():
    marks = [Mark(float(x), "skip") for x in range(5000)] + [Mark(3.0, "alarm"), Mark(9e9, "back")]
    drawn = draw(Chart("loss", [line(np.arange(5000.0))], levels=[Level(2500.0, "half")], marks=marks))
    kinds = dict(drawn.marks)
    assert set(kinds) == {"skip", "alarm"}, "what lies outside is no mark"
    assert kinds["skip"].count("M") <= curves.MARKS + 1
    assert drawn.levels[0].text == "half"
    assert TOP < drawn.levels[0].at < HEIGHT - BOTTOM


def test_letters_at_the_ends_do_not_cover_each_other():
    lines = [line([1.0, 2.0 + i / 1000], style=i, letter="ABCDEFGH"[i]) for i in range(8)]
    heights = sorted(path.end[1] for path in draw(Chart("loss", lines)).paths)
    assert min(np.diff(heights)) >= 4
    assert heights[-1] <= HEIGHT - BOTTOM


@pytest.mark.parametrize(("value", "text"), [
    (0.0, "0"), (1234.0, "1234"), (12345.0, "12.35k"), (2.5e6, "2.5M"), (3e-5, "3e-5"),
    (1e20, "1e20"), (-0.25, "-0.25"),
])  # fmt: skip
def test_numbers_in_a_few_characters(value, text):
    assert curves.short(value) == text
