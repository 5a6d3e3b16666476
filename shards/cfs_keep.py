"""Keep some samples of a set: by score, by a published list, or by chance.

    python shards/cfs_keep.py scores/luperson --fraction 0.5 --out keep.npz
    python shards/cfs_keep.py scores/luperson --number 2090122 --out CFS_list.pkl            the published format
    python shards/cfs_keep.py scores/luperson --fraction 0.5 --random --seed 0 --out random.npz     a control
    python shards/cfs_keep.py --shards data/luperson --fraction 0.1 --random --out random.npz        no scores needed
    python shards/cfs_keep.py --from CFS_list.pkl --number 2090122 --shards data/luperson --out keep.npz
    python shards/cfs_keep.py scores/luperson --fraction 0.5 --shards data/luperson --pack data/luperson_cfs50

A list is honoured where shards are read, without packing anything: `loader.keep=keep.npz` of a pretraining. Its
ending decides: .npz holds rows and belongs to one set; .pkl and .txt hold image names, best first. --pack writes the
samples as a set of its own, whose manifest names its parent. --random takes from what is scored, listed or in the set.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from recipes.errors import UserError, plain_errors
from shards import cfs, keep_list, subset
from shards.embeddings import Keys
from shards.images import ImagesConfig
from shards.manifests import read_manifest
from shards.packing import PackingConfig
from shards.reader import ShardReader
from shards.schema import SPLITS
from shards.unpacked import is_source
from shards.writer import pack


def arguments() -> argparse.Namespace:
    """The command line, as far as it can be checked without reading anything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scores", nargs="?", type=Path, help="what shards/cfs_score.py wrote")
    parser.add_argument("--from", dest="names", type=Path, metavar="LIST", help="a published list, instead of scores")
    parser.add_argument("--fraction", type=float, help="share of the samples to keep, in (0, 1]")
    parser.add_argument("--number", type=int, help="samples to keep")
    parser.add_argument("--random", action="store_true", help="a control: keep as many by chance")
    parser.add_argument("--seed", type=int, default=0, help="of --random; default: 0")
    parser.add_argument(
        "--shards", action="append", help="the set, where no scores tell it and for --pack; again for more sets"
    )
    parser.add_argument(
        "--splits", nargs="+", default=["unlabeled"], choices=SPLITS, help="without scores; default: unlabeled"
    )
    parser.add_argument("--out", type=Path, metavar="LIST", help="keep-list to write: .npz, .pkl or .txt")
    parser.add_argument("--pack", type=Path, metavar="OUT", help="shard set to write")
    given = parser.parse_args()
    if given.scores is not None and given.names is not None:
        raise UserError("give either a folder of scores or a list by --from, not both")
    if given.scores is None and given.names is None and not given.random:
        raise UserError("say what to keep: give a folder of scores, a list by --from, or --random")
    if not (given.out or given.pack):
        raise UserError("say what to write: a keep-list by --out, or a shard set by --pack")
    if given.out:
        keep_list.check_kind(given.out)
    if (given.scores is None or given.pack) and not given.shards:
        raise UserError("--from, --pack and --random without scores need the set: give it by --shards")
    if given.seed < 0:
        raise UserError(f"--seed {given.seed} is below 0")
    return given


def candidates(given: argparse.Namespace) -> tuple[np.ndarray, Keys, dict[str, Any], ShardReader | None]:
    """Rows from the best to the worst, int64; the keys of the whole set; what is told of both; the set, if given."""
    if given.scores is None:
        reader = ShardReader(given.shards, given.splits)
        order = keep_list.ordered(given.names, reader) if given.names else np.arange(len(reader))
        facts = {"set": reader.identity, "by": "list"} | ({"list": given.names.name} if given.names else {})
        return order, Keys(reader.keys), facts, reader
    scores = cfs.Scores.load(given.scores)
    told, reader = scores.facts["set"], None
    if given.shards:
        reader = ShardReader(given.shards, cfs.splits_of(told))
        cfs.check_set(reader, told, scores.keys)
        told = reader.identity
    facts = {"set": told, "by": "cfs", "scores": scores.facts["digest"]}
    return cfs.ranking(scores.values), scores.keys, facts, reader


def pack_subset(reader: ShardReader, rows: np.ndarray, out: Path, facts: dict[str, Any], parent: str) -> None:
    """Write the samples of `rows` as a set with the settings of its parent."""
    settings = {} if is_source(parent) else read_manifest(parent).packing
    same = {name: settings[name] for name in ("shard_samples", "seed") if name in settings}
    records = subset.records(reader, np.sort(rows))
    pack(records, out, PackingConfig(**same), ImagesConfig(), subset.described(reader, facts))


def main() -> None:
    """Entry point."""
    given = arguments()
    order, keys, facts, reader = candidates(given)
    number = cfs.wanted(len(order), given.fraction, given.number)
    if given.random:
        rows = np.sort(order)[cfs.drawn(len(order), number, given.seed)]
        facts |= {"by": "random", "seed": given.seed}
    else:
        rows = order[:number]
    facts |= {"kept": number, "of": len(keys), "candidates": len(order)}
    if given.out:
        if given.out.suffix.lower() == ".npz" and facts["set"] is None:
            raise UserError("the tables did not tell of which set they are; give the set by --shards")
        keep_list.save(given.out, rows, keys, facts)
        print(f"{number:,} of {len(keys):,} samples kept ({facts['by']}): {given.out}")
    if given.pack:
        assert reader is not None, "checked with the arguments"
        pack_subset(reader, rows, given.pack, facts, given.shards[0])
        print(f"{number:,} of {len(keys):,} samples packed ({facts['by']}): {given.pack}")


if __name__ == "__main__":
    with plain_errors():
        main()
