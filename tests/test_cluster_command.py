"""The side command: which clusters a table of features has, without training."""

import csv

import numpy as np
import pytest
import small
from test_rerank import unit

from finetune.clusters import ClustersConfig, find
from shards.embeddings import EmbeddingTable

SETTINGS = ["--k1", "8", "--k2", "3"]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """90 images of a few crowds; the first half has labels."""
    folder, rows = tmp_path_factory.mktemp("table") / "t", np.arange(90)
    labels = np.where(rows < 45, rows % 7 + 1, -2), np.where(rows < 45, rows % 2, -2)
    EmbeddingTable(unit(3, 90), *labels, [f"image-{row}" for row in rows]).save(folder)
    return folder


def run(table, *more: str) -> int:
    return small.run([str(small.ROOT / "finetune/cluster.py"), str(table), *SETTINGS, *more])


def lines(printed: str) -> list[dict[str, float]]:
    title, *rest = [line.split() for line in printed.splitlines() if line.startswith("  ")]
    return [dict(zip(title, map(float, row), strict=True)) for row in rest]


def test_several_eps_are_what_each_alone_gives(table, capsys):
    assert run(table, "--eps", "0.7", "0.5", "0.6") == 0
    together = lines(capsys.readouterr().out)
    assert [line["eps"] for line in together] == [0.7, 0.5, 0.6]
    for line in together:
        assert run(table, "--eps", str(line["eps"])) == 0
        assert lines(capsys.readouterr().out) == [line]
        labels = find(unit(3, 90), ClustersConfig(k1=8, k2=3, eps=line["eps"]), 0).labels
        assert (line["clusters"], line["noise"]) == (labels.max() + 1, (labels < 0).sum())
    assert together[1]["noise"] > together[0]["noise"]


def test_the_cluster_of_each_image_is_written(table, tmp_path, capsys):
    assert run(table, "--eps", "0.6", "--out", str(tmp_path / "out")) == 0
    rows = list(csv.DictReader((tmp_path / "out" / "clusters.csv").open()))
    labels = find(unit(3, 90), ClustersConfig(k1=8, k2=3, eps=0.6), 0).labels
    assert [row["key"] for row in rows] == [f"image-{row}" for row in range(90)]
    assert [int(row["cluster"]) for row in rows] == labels.tolist()
    told = small.json_of(tmp_path / "out" / "clusters.json")
    assert told["clusters"] == labels.max() + 1
    assert 0 < told["purity"] <= 1
    assert (told["settings"]["k1"], told["settings"]["eps"]) == (8, 0.6)


def test_kmeans(table, capsys):
    assert run(table, "--kmeans", "5") == 0
    printed = capsys.readouterr().out
    assert "nan" not in printed
    assert printed.splitlines()[1].split()[0] == "5", "no eps, five clusters"


def test_what_does_not_go_is_told(table, tmp_path, capsys):
    assert run(table, "--eps", "0.5", "0.6", "--out", str(tmp_path / "out")) == 2
    assert "--out takes the clusters of one --eps" in capsys.readouterr().err
    assert run(table, "--eps", "1.5") == 2
    assert "eps = 1.5 is refused" in capsys.readouterr().err
