"""Cluster the features of a table without training: which k1 and eps suit a set takes seconds to see.

    python finetune/embed.py --ckpt runs/pretrain --shards data/own --out tables/own
    python finetune/cluster.py tables/own --eps 0.4 0.5 0.6 0.7             a line of numbers for each eps
    python finetune/cluster.py tables/own --eps 0.6 --out clusters/own      and which image is in which cluster

Prints for each eps how many clusters there are, how many images in none, the mean and the largest cluster, and where
the table has labels, how well the clusters agree with them. OUT/clusters.csv has a row an image, cluster -1: in none;
OUT/clusters.json has the numbers. The settings are those of the section method.clusters of Cluster Contrast's recipes.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from finetune.clusters import ClustersConfig, dbscan, find, statistics
from finetune.reporting import write_csv
from finetune.rerank import RerankConfig, jaccard
from recipes.errors import UserError, plain_errors
from recipes.load import validate
from recipes.record import write_json
from shards.embeddings import EmbeddingTable

COLUMNS = ("eps", "clusters", "noise", "mean_size", "largest", "purity", "ari", "camera_purity")


def arguments() -> argparse.Namespace:
    """The command line."""
    known = ClustersConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="folder that finetune/embed.py wrote")
    parser.add_argument("--eps", type=float, nargs="+", default=[known.eps], help="Jaccard distances, 0..1")
    parser.add_argument("--k1", type=int, default=known.k1, help="neighbours that must be mutual; default: 30")
    parser.add_argument("--k2", type=int, default=known.k2, help="rows averaged; default: 6")
    parser.add_argument("--min-samples", type=int, default=known.min_samples, help="images of a core; default: 4")
    parser.add_argument("--kmeans", type=int, metavar="K", help="k-means with K clusters in the place of DBSCAN")
    parser.add_argument("--out", type=Path, help="folder for clusters.csv and clusters.json; takes one --eps")
    given = parser.parse_args()
    if given.out and len(given.eps) > 1:
        raise UserError("--out takes the clusters of one --eps; look at several first, then write one")
    return given


def config_of(given: argparse.Namespace, eps: float) -> ClustersConfig:
    """The section method.clusters of one eps, which is not to be changed."""
    tree = {"k1": given.k1, "k2": given.k2, "min_samples": given.min_samples, "eps": eps, "eps_range": (eps, eps)}
    tree |= {"kind": "kmeans", "clusters": given.kmeans} if given.kmeans is not None else {}
    return validate(ClustersConfig, tree, "the command line")


def groupings(given: argparse.Namespace, features: np.ndarray) -> dict[float | None, np.ndarray]:
    """Labels int64 [N] for each eps; the distances are computed once for all."""
    configs = [config_of(given, eps) for eps in given.eps]
    if given.kmeans is not None or len(configs) == 1:
        found = find(features, configs[0], 0)
        return {found.eps: found.labels}
    near = jaccard(features, RerankConfig(k1=given.k1, k2=given.k2, variant="clustering"), max(given.eps))
    return {eps: dbscan(near, eps, given.min_samples) for eps in given.eps}


def line(told: dict[str, Any]) -> str:
    """The numbers of one eps, each below its title."""
    cells = (told.get(name, "") for name in COLUMNS)
    return "".join(f"{cell:>14.3f}" if isinstance(cell, float) else f"{cell:>14}" for cell in cells)


def main() -> None:
    """Entry point."""
    given = arguments()
    table = EmbeddingTable.load(given.table)
    features = np.asarray(table.features, np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)  # a table of float16 has no length of exactly 1
    found, told = groupings(given, features), {}
    print("".join(f"{name:>14}" for name in COLUMNS))
    for eps, labels in found.items():
        told = statistics(labels, table.pids, table.camids) | ({} if eps is None else {"eps": eps})
        print(line(told))
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        write_csv(given.out / "clusters.csv", ("key", "cluster"), zip(table.keys, labels.tolist(), strict=True))
        settings = {"table": str(given.table), **config_of(given, given.eps[0]).model_dump()}
        write_json(given.out / "clusters.json", {**told, "settings": settings})
        print(f"{given.out / 'clusters.csv'}: the cluster of each image")


if __name__ == "__main__":
    with plain_errors():
        main()
