"""Tables, rows and pictures of an evaluation: their numbers are those of results.json, pictures say what they show."""

import csv

import numpy as np
import pytest
from PIL import Image

from finetune import reporting
from finetune.reporting import Histogram

NUMBERS = {"mAP": 0.5, "rank1": 0.625, "rank5": 0.75, "rank10": 0.875, "mINP": 0.25, "valid": 8, "skipped": 2}
INTERVALS = {"level": 0.95, "resamples": 1000, "mAP": [0.4, 0.61], "rank1": [0.5, 0.75], "rank5": [0.7, 0.8]} | {
    "rank10": [0.8, 0.9],
    "mINP": [0.2, 0.3],
}
COUNTS = {"images": 1200, "identities": 10, "cameras": 2, "distractors": 3, "junk": 0, "unlabelled": 0}
TOLD = {
    **{**NUMBERS, "intervals": INTERVALS, "title": "runs/market", "data": ["MSMT17 V2"], "shards": "data/msmt17"},
    **{"version": "0123456789ab", "splits": {"query": {**COUNTS, "distractors": 0}, "gallery": COUNTS}, "dim": 384},
    **{"flip": False, "protocol": {"same_camera": "drop", "rules": "the rules"}, "not_measured": []},
    "verification": {
        "tar": {"0.1": {"tar": 0.9, "far": 0.1, "threshold": 0.2}, "0.0001": None},
        "eer": 0.123,
        "open_set": {"unknown_queries": 4, "known_queries": 6, "dir": {"0.1": {"dir": 0.42}, "0.01": None}},
    },
    "calibration": {"threshold": 0.7312, "tar": 0.812, "far": 0.00099},
}


def rows_of(text: str) -> list[list[str]]:
    """Cells of the first table of a page, without its head."""
    lines = [line for line in text.split("\n") if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_a_table_has_a_row_for_each_set_and_search():
    again = {**NUMBERS, "mAP": 0.6, "rerank": {"k1": 20, "k2": 6, "lam": 0.3}}
    text = reporting.table("runs/market", [{**TOLD, "reranked": again}, {**TOLD, "data": ["A", "B"]}], {})
    first, second, third = rows_of(text)
    assert first == ["MSMT17 V2", "plain", "50.0 [40.0, 61.0]", "62.5 [50.0, 75.0]", "75.0 [70.0, 80.0]",
                     "87.5 [80.0, 90.0]", "25.0 [20.0, 30.0]"]  # fmt: skip
    assert second[1:4] == ["re-ranked (k1=20, k2=6, λ=0.3)", "60.0", "62.5"]  # without intervals
    assert third[0] == "A + B"
    assert text.startswith("# runs/market\n")
    assert "95 % interval, bootstrap over the queries (1,000 resamples)" in text


def test_with_every_number_stand_data_version_split_and_protocol():
    text = reporting.table("t", [TOLD], {})
    for told in (
        "MSMT17 V2, `data/msmt17`, version `0123456789ab`",
        "query: 1,200 images of 10 identities, 2 cameras; gallery: 1,200 images (3 distractors among them) of 10",
        "the rules; 8 queries count, 2 have no match",
        "`runs/market`; features 384-dimensional",
        "TAR 90.0 % at FAR 0.1, – % at FAR 0.0001; equal error rate 12.3 %",
        "4 queries without and 6 with their person in the gallery: DIR 42.0 % at FAR 0.1, – % at FAR 0.01",
        "cosine 0.73120; it accepts 81.2 % of the pairs of one person, 0.099 % of the others",
    ):
        assert told in text
    assert "flip" not in text
    assert "with flip averaging" in reporting.table("t", [{**TOLD, "flip": True}], {})
    line = reporting.sentence(TOLD)
    assert line == (
        "MSMT17 V2 (0123456789ab), query in gallery; the rules\n"
        "plain: mAP 50.0  Rank-1 62.5  Rank-5 75.0  mINP 25.0  (8 queries, 2 without a match)"
    )


def test_what_was_not_measured_is_said():
    text = reporting.table("t", [{**TOLD, "verification": None, "calibration": None, "not_measured": ["too few"]}], {})
    assert "* not measured: too few" in text
    assert "threshold" not in text
    assert "interval" not in reporting.table("t", [{**TOLD, "intervals": None}], {})


def test_pictures_have_words_and_pages_are_linked():
    text = reporting.table("t", [TOLD], {"a.png": "what a shows"}, {"x/table.md": "x"})
    assert text.endswith("\nMore: [x](x/table.md).\n\n![what a shows](a.png)\n")


def test_csv_is_exact_and_empty_where_nothing_is_known(tmp_path):
    path = tmp_path / "q.csv"
    reporting.write_csv(
        path, ("key", "ap", "first"), [('a,"b"', np.float64(0.1), None), ("c", float("nan"), np.int64(3))]
    )
    with path.open(newline="") as file:
        assert list(csv.reader(file)) == [["key", "ap", "first"], ['a,"b"', "0.1", ""], ["c", "", "3"]]
    assert [entry.name for entry in tmp_path.iterdir()] == ["q.csv"]


def histogram() -> Histogram:
    """10 pairs of one person at a cosine of 0.85, 30 of two people at 0.15 and 10 at 0.25."""
    edges = np.linspace(-1, 1, 21)
    positive, negative = np.zeros(20, int), np.zeros(20, int)
    positive[18], negative[11], negative[12] = 10, 30, 10
    return Histogram(edges, positive, negative)


def test_a_histogram_is_cut_to_where_the_pairs_are():
    edges = np.linspace(-1, 1, 1 + (1 << 16))
    positive, negative = np.zeros((2, 1 << 16), int)
    positive[-1], positive[-300:-280], negative[-1000] = 5, 2, 7  # as of a model whose cosines all lie near 1
    shown = reporting._drawn_part(Histogram(edges, positive, negative))
    assert reporting.BARS / 2 < len(shown.positive) <= reporting.BARS
    assert shown.positive.sum() == 45
    assert shown.negative[0] == 7 == shown.negative.sum()
    assert shown.edges[0] == edges[-1001]
    assert shown.edges[-1] == 1
    assert (np.diff(shown.edges) > 0).all()
    assert len(reporting._drawn_part(histogram()).positive) == 8  # fewer bins than bars: as they are, -1 + 11 / 10 on
    assert [reporting.distance(c) for c in (1.0, 0.5, 0.99877, -0.2, 1.0000001)] == [
        *("0.000", "0.500", "0.00123", "1.200", "0.000")
    ]


def test_distances(tmp_path):
    roc = [[1.0, 0.0, 0.0], [0.8, 0.0, 1.0], [0.2, 0.25, 1.0], [-1.0, 1.0, 1.0]]
    words = reporting.draw_distances(tmp_path / "d.png", histogram(), {"FAR 0.001": 0.7}, roc)
    assert "10 pairs of one person (mean 0.150)" in words
    assert "40 pairs of two people (mean 0.825)" in words
    assert "FAR 0.001 0.300" in words
    picture = np.asarray(Image.open(tmp_path / "d.png").convert("L"))
    assert picture.shape[1] > 1000
    assert (picture < 128).any()
    assert [entry.name for entry in tmp_path.iterdir()] == ["d.png"]
    other = reporting.draw_distances(tmp_path / "e.png", histogram(), {"FAR 0.001": 0.5}, roc)
    assert "0.500" in other
    assert (np.asarray(Image.open(tmp_path / "e.png").convert("L")) != picture).any(), "the threshold is drawn"


@pytest.mark.parametrize("cameras", [2, reporting.WRITTEN + 1])
def test_cameras(cameras, tmp_path):
    pairs = [
        {"query": a, "gallery": b, "queries": 1, "mAP": 0.9 if (a, b) == (0, 1) else 0.1 if (a, b) == (1, 0) else 0.5}
        for a in range(cameras)
        for b in range(cameras)
        if a != b
    ]
    words = reporting.draw_cameras(tmp_path / "c.png", pairs)
    assert f"{cameras * (cameras - 1)} pairs of cameras" in words
    assert "best 90.0 % (query camera 0, gallery camera 1), worst 10.0 % (1, 0)" in words
    plain = np.asarray(Image.open(tmp_path / "c.png").convert("L")).astype(int)
    swapped = [{**pair, "mAP": 1 - pair["mAP"]} for pair in pairs]
    reporting.draw_cameras(tmp_path / "s.png", swapped)
    assert (np.abs(np.asarray(Image.open(tmp_path / "s.png").convert("L")) - plain) > 100).any(), "grey says it too"


def test_a_picture_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError):
        reporting.draw_cameras(tmp_path / "missing" / "c.png", [{"query": 0, "gallery": 1, "queries": 1, "mAP": 0.5}])
    assert not list(tmp_path.iterdir())
