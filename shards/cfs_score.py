"""Score the samples of a set by how little they move between two models: the catastrophic forgetting score.

    python finetune/embed.py --ckpt runs/source --shards data/luperson --out tables/source
    python finetune/embed.py --ckpt runs/target --shards data/luperson --out tables/target
    python shards/cfs_score.py tables/source tables/target --out scores/luperson --shards data/luperson

source: the model of the pretraining; target: the same, gone on with the target set (recipes/pretrain/cfs_target.yaml).
Writes OUT/scores.npy (float64, the rows of the set), OUT/keys.npy, OUT/scores.json (what was scored, quantiles) and
OUT/histogram.png; with --shards also OUT/sheet.png, the best and the worst images. Next: shards/cfs_keep.py.
"""

import argparse
from pathlib import Path

from recipes.errors import UserError, plain_errors
from shards import cfs, cfs_pictures
from shards.embeddings import EmbeddingTable
from shards.reader import ShardReader


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="table of the source model")
    parser.add_argument("target", type=Path, help="table of the target model, of the same set")
    parser.add_argument("--out", required=True, type=Path, help="folder for the scores")
    parser.add_argument("--shards", action="append", help="the set, for the sheet of images; again for more sets")
    given = parser.parse_args()
    if given.out.exists() and not given.out.is_dir():
        raise UserError(f"--out {given.out} is a file; scores go into a folder")
    source, target = (EmbeddingTable.load(folder, mapped=True) for folder in (given.source, given.target))
    if not len(source):
        raise UserError(f"{given.source} has no rows; there is nothing to score")
    reader = None
    if given.shards:
        reader = ShardReader(given.shards, cfs.splits_of(source.facts.get("set")))
        cfs.check_set(reader, source.facts.get("set"), source.keys)
    scores = cfs.Scores.of(source, target)
    scores.save(given.out)
    cfs_pictures.histogram(given.out / "histogram.png", scores.values)
    if reader is not None:
        cfs_pictures.contact_sheet(given.out / "sheet.png", reader, scores.values, cfs.ranking(scores.values))
    low, middle, high = (scores.facts["quantiles"][str(q)] for q in (0.0, 0.5, 1.0))
    print(
        f"{len(scores.values):,} samples scored: lowest {low:.4f}, median {middle:.4f}, highest {high:.4f}; {given.out}"
    )


if __name__ == "__main__":
    with plain_errors():
        main()
