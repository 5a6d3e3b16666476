"""The catastrophic forgetting score: how little a model's feature of an image moves when the model adapts to a target.

c(x) = <s(x), t(x)> / (|s(x)| |t(x)|), s the model trained on the source images, t the same after training went on with
the target images; what scores high is close to the target and kept (Luo et al. 2021, arXiv 2111.12084).
"""

import hashlib
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recipes.errors import UserError
from recipes.record import write_json
from shards.embeddings import FORMAT_VERSION, EmbeddingTable, Keys, read_array, read_facts, write_array
from shards.reader import ShardReader
from shards.schema import SPLITS
from shards.seeds import generator

BLOCK = 2**22  # numbers of a table in memory at a time; 32 MB in float64
SCORES = "scores.json"
QUANTILES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 0.95, 0.99, 1.0)


def check_same_rows(source: EmbeddingTable, target: EmbeddingTable) -> None:
    """UserError unless both tables hold the same samples in the same order, by their sets or else by their keys."""
    if len(source) != len(target):
        raise UserError(
            f"the tables have {len(source):,} and {len(target):,} rows; embed the same set with both models"
        )
    sets = source.facts.get("set"), target.facts.get("set")
    if all(sets):
        if sets[0] != sets[1]:
            raise UserError(f"the tables are of different sets, {sets[0]} and {sets[1]}; embed the same set with both")
        return
    for at in range(0, len(source), BLOCK):
        ours, theirs = (table.keys.names[at : at + BLOCK] for table in (source, target))
        other = np.flatnonzero(ours != theirs)
        if len(other):
            row = at + int(other[0])
            raise UserError(
                f"row {row} is {source.keys[row]!r} in one table and {target.keys[row]!r} in the other; "
                "embed the same set with both models"
            )


def splits_of(identity: dict[str, Any] | None) -> list[str]:
    """The splits that a set was read with; all of them where nobody told."""
    return list(dict.fromkeys(s for part in identity["sets"] for s in part["splits"])) if identity else list(SPLITS)


def check_set(reader: ShardReader, identity: dict[str, Any] | None, keys: Keys) -> None:
    """UserError unless the reader gives the samples of the set `identity`, or where nobody told, of these keys."""
    if identity is None and Keys(reader.keys) == keys:
        return
    if reader.identity != identity:
        raise UserError(
            f"--shards give {reader.identity}, but the scores are of {identity or 'other keys'}; give that set"
        )


def _norms(block: np.ndarray, table: EmbeddingTable, name: str, at: int) -> np.ndarray:
    norms = np.sqrt(np.einsum("nd,nd->n", block, block))
    bad = np.flatnonzero(~((norms > 0) & np.isfinite(norms)))
    if len(bad):
        row = at + int(bad[0])
        what = "zero" if norms[bad[0]] == 0 else "not finite"
        raise UserError(f"the {name} feature of row {row} ({table.keys[row]!r}) is {what}; it has no score")
    return norms


def scores(source: EmbeddingTable, target: EmbeddingTable) -> np.ndarray:
    """c of each row, float64 [N] in [-1, 1]. The tables may be mapped: a block of rows is in memory at a time.

    UserError if the tables are not of the same samples, or a feature is zero or not finite.
    """
    check_same_rows(source, target)
    dims = source.features.shape[1], target.features.shape[1]
    if dims[0] != dims[1]:
        raise UserError(f"the features have {dims[0]} and {dims[1]} numbers; the target must continue the source")
    found, rows = np.empty(len(source)), max(1, BLOCK // max(1, dims[0]))
    for at in range(0, len(source), rows):
        s, t = (table.features[at : at + rows].astype(np.float64) for table in (source, target))
        lengths = _norms(s, source, "source", at) * _norms(t, target, "target", at)
        found[at : at + rows] = np.einsum("nd,nd->n", s, t) / lengths
    return np.clip(found, -1, 1)


def ranking(values: np.ndarray) -> np.ndarray:
    """Rows from the highest score to the lowest, int64 [N]; of equal ones the first row first."""
    return np.argsort(-values, kind="stable").astype(np.int64)


def wanted(rows: int, fraction: float | None, number: int | None) -> int:
    """How many of `rows` to keep: `number`, or the fraction in (0, 1] rounded half up. UserError if that cannot be."""
    if (fraction is None) == (number is None):
        raise UserError("give either --fraction or --number")
    if fraction is not None:
        if not 0 < fraction <= 1:
            raise UserError(f"--fraction {fraction} is not in (0, 1]")
        number = math.floor(rows * fraction + 0.5)
    assert number is not None
    if not 1 <= number <= rows:
        raise UserError(
            f"{number:,} samples are to be kept, but there are {rows:,}; give another --number or --fraction"
        )
    return number


def drawn(rows: int, number: int, seed: int) -> np.ndarray:
    """The control: `number` different rows of `rows` by chance, int64, in the order in which they were drawn."""
    return generator(seed, "cfs control").permutation(rows)[:number].astype(np.int64)


class Scores(NamedTuple):
    """The score of each sample of a set."""

    values: np.ndarray  # float64 [N]
    keys: Keys
    facts: dict[str, Any]  # `set`, `source`, `target`, `quantiles`, `digest` (of the values)

    @staticmethod
    def of(source: EmbeddingTable, target: EmbeddingTable) -> "Scores":
        """Score two tables and note what they were made from."""
        values = scores(source, target)
        told = {str(q): float(v) for q, v in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)}
        made = {
            name: {k: v for k, v in t.facts.items() if k != "set"}
            for name, t in (("source", source), ("target", target))
        }
        digest = hashlib.sha256(np.ascontiguousarray(values, "<f8").tobytes()).hexdigest()
        found = source.facts.get("set") or target.facts.get("set")
        return Scores(values, source.keys, {"set": found, **made, "quantiles": told, "digest": digest})

    def save(self, folder: Path) -> None:
        """Write scores.npy, keys.npy and, last, scores.json."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / SCORES).unlink(missing_ok=True)
            write_array(folder / "scores.npy", self.values)
            write_array(folder / "keys.npy", self.keys.names)
            write_json(
                folder / SCORES, {"format_version": FORMAT_VERSION, "rows": len(self.values), "facts": self.facts}
            )
        except OSError as error:
            raise UserError(f"scores {folder} cannot be written: {error.strerror or error}") from error

    @staticmethod
    def load(folder: Path) -> "Scores":
        """Read what `save` wrote. UserError if it is missing or damaged."""
        tree = read_facts(folder / SCORES, "folder of scores")
        values, keys = read_array(folder / "scores.npy", [np.float64]), read_array(folder / "keys.npy", [bytes])
        if not values.shape == keys.shape == (tree.get("rows"),):
            raise UserError(f"{folder} holds {values.shape} scores and {keys.shape} keys; score the tables again")
        return Scores(values, Keys(keys), tree["facts"])
