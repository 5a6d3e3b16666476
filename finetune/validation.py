"""Choosing the best epoch of a fine-tune on identities held out of its training split, never on the test set.

Off by default: the published results train on all identities and take the last epoch (Luo et al. 2019; PersonViT, arXiv
2408.05398). With `validation.identities` set, so many training identities are not trained on. Their images are split as
Market-1501 splits its test identities (Zheng et al. 2015): of each identity one image a camera is a query, the others
are the gallery. The model of the epoch with the highest mAP is kept in OUT/best. The splits query and gallery of the
set are not read.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field
from torch import nn

from finetune.metrics import JUNK, Protocol, Retrieval, evaluate
from finetune.verification import calibrate
from pretrain.checkpoint import CONFIG, WEIGHTS, load_model
from recipes.errors import UserError
from recipes.load import Section
from recipes.record import write_json
from shards.embeddings import EmbeddingTable
from shards.reader import ShardReader
from shards.schema import UNKNOWN
from shards.seeds import generator

BEST, CURVE = "best", "validation.json"
FOUND = "validation"  # key in the config of the model in OUT/best

Embed = Callable[[ShardReader, np.ndarray], EmbeddingTable]  # rows int64 of a reader -> their features


class ValidationConfig(Section):
    """Which training identities are held out, and how often the model is scored on them."""

    identities: int = Field(0, ge=0)  # held out, 2 or more; 0 = none: train on all, take the last epoch
    every_epochs: int = Field(10, ge=1)  # epochs between two scores; the last epoch is scored as well
    seed: int = Field(0, ge=0)  # draws the identities and the query images


@dataclass(frozen=True, eq=False)
class Split:
    """A training split in two parts that share no identity."""

    kept: np.ndarray  # bool [N], True: may be trained on
    query: np.ndarray  # int64 [Q], ascending rows of held-out images that search
    gallery: np.ndarray  # int64 [G], ascending rows of held-out images that are searched
    identities: np.ndarray  # int64 [V], ascending, held out

    def training_pids(self, pids: np.ndarray) -> np.ndarray:
        """The pids of all rows, int64 [N], with those that are held out as junk, for identities.select_identities."""
        return np.where(self.kept, pids, JUNK)


def _count(pids: np.ndarray, camids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images by identity and camera: identities int64 [C], cameras int64 [A], counts int64 [C, A]; pid > 0 only."""
    named = pids > 0
    identities, row = np.unique(pids[named], return_inverse=True)
    cameras, column = np.unique(camids[named], return_inverse=True)
    shape = len(identities), len(cameras)
    counts = np.bincount(row * shape[1] + column, minlength=shape[0] * shape[1]).reshape(shape)
    return identities, cameras, counts


def _searching(counts: np.ndarray, same_camera: str) -> np.ndarray:
    """Where an identity's image of a camera can be a query, bool [C, A]: one image a camera is taken out of the gallery
    and a match must be left in it, on another camera where the protocol drops the same one."""
    left = np.maximum(counts - 1, 0)
    matches = left.sum(axis=1, keepdims=True) - (left if same_camera == "drop" else 0)
    return (counts > 0) & (matches > 0)


def _chosen(config: ValidationConfig, identities: np.ndarray, usable: np.ndarray, protocol: Protocol) -> np.ndarray:
    """The held-out identities, ascending. usable: bool [C]. UserError where there are too few."""
    if config.identities == 1:
        raise UserError("validation.identities = 1: a search among one identity finds it always; set 2 or more, or 0")
    other = "on two cameras, with two images on one of them" if protocol.same_camera == "drop" else "with two images"
    most = min(int(usable.sum()), len(identities) - 2)
    if most < 2:
        raise UserError(
            f"validation.identities = {config.identities}: of the {len(identities)} training identities "
            f"{int(usable.sum())} were seen {other}, and two must stay to train on; set validation.identities=0"
        )
    if config.identities > most:
        raise UserError(
            f"validation.identities = {config.identities}, but only {most} of the {len(identities)} training "
            f"identities can be held out (seen {other}; two stay to train on); set it to at most {most}"
        )
    order = generator(config.seed, "validation.identities").permutation(int(usable.sum()))
    return np.sort(identities[usable][order[: config.identities]])


def hold_out(config: ValidationConfig, pids: np.ndarray, camids: np.ndarray, protocol: Protocol | None = None) -> Split:
    """Split the rows of a training split, a pure function of its arguments.

    pids, camids: int64 [N]. A smaller `identities` gives a subset of a larger one's. Identities that cannot be searched
    under the protocol (Market-1501's by default) are not held out; images with pid <= 0 stay in the training part,
    where they are ignored. UserError where too few identities can be held out.
    """
    protocol = protocol or Protocol()
    kept = np.ones(len(pids), bool)
    if not config.identities:
        return Split(kept, np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64))
    identities, cameras, counts = _count(pids, camids)
    if protocol.same_camera == "drop" and (cameras == UNKNOWN).all():
        raise UserError(
            "validation.identities: the training images have no camera labels, but a match must come from another "
            "camera; label camids, or set benchmark.protocol.same_camera=keep"
        )
    searching = _searching(counts, protocol.same_camera)
    held = _chosen(config, identities, searching.any(axis=1), protocol)
    kept = ~np.isin(pids, held)
    query = []
    for pid in held.tolist():
        rows = np.flatnonzero(pids == pid)
        rows = generator(config.seed, "validation.query", pid).permutation(rows)
        for camera in cameras[searching[np.searchsorted(identities, pid)]]:
            query.append(rows[camids[rows] == camera][0])
    query = np.sort(np.array(query, np.int64))
    return Split(kept, query, np.setdiff1d(np.flatnonzero(~kept), query), held)


def retrieve(reader: ShardReader, split: Split, embed: Embed, protocol: Protocol | None = None) -> Retrieval:
    """Search the held-out queries in the held-out gallery. reader: of the training split that `split` cuts."""
    return evaluate(embed(reader, split.query), embed(reader, split.gallery), protocol or Protocol())


class Validation:
    """Scores a model on the held-out identities as its training goes on, and keeps the best.

    OUT/best is a model as OUT/model is; its config tells epoch and numbers under "validation". OUT/validation.json
    holds the numbers of every epoch that was scored. Only the main process may call `rewind`, `after` and `restore`.
    """

    def __init__(
        self,
        config: ValidationConfig,
        reader: ShardReader,
        split: Split,
        out: Path,
        protocol: Protocol | None = None,
        score: Callable[..., Retrieval] = retrieve,
    ):
        """reader: of the training split; split: what hold_out made of it; out: the run folder. score: how an epoch is
        scored, with the arguments of `retrieve`."""
        self.config, self.reader, self.split, self.out = config, reader, split, Path(out)
        self.protocol, self.score = protocol or Protocol(), score

    def due(self, epoch: int, epochs: int) -> bool:
        """Whether to score when `epoch` (1..epochs) epochs of `epochs` are done."""
        return self.config.identities > 0 and (epoch % self.config.every_epochs == 0 or epoch == epochs)

    def rows(self) -> list[dict[str, Any]]:
        """The numbers of the epochs that were scored, in their order."""
        path = self.out / CURVE
        if not path.is_file():
            return []
        try:
            return list(json.loads(path.read_text(encoding="utf-8"))["epochs"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}); delete it, the run goes on without its lines") from error

    def best(self) -> dict[str, Any] | None:
        """Epoch and numbers of the model in OUT/best; None where there is none yet."""
        path = self.out / BEST / CONFIG
        if not (self.out / BEST / WEIGHTS).is_file():
            return None
        try:
            return dict(json.loads(path.read_text(encoding="utf-8"))[FOUND])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} does not tell how good that model was ({error}); delete {path.parent} and start the run anew"
            ) from error

    def _write(self, rows: list[dict[str, Any]]) -> None:
        counts = {"identities": len(self.split.identities), "query": len(self.split.query)}
        told = {**counts, "gallery": len(self.split.gallery), "protocol": self.protocol.model_dump(), "epochs": rows}
        write_json(self.out / CURVE, told)

    def rewind(self, epoch: int) -> None:
        """The training goes on after `epoch` epochs: forget later ones, which will be scored again.

        The best model stays, also one of a later epoch: its numbers are its own, and the epoch comes again with equal
        ones. From epoch 0 on it is another training, and the best of an earlier one must not win over it.
        """
        if not self.config.identities:
            return
        if epoch == 0 and (self.out / BEST / WEIGHTS).is_file():
            (self.out / BEST / WEIGHTS).unlink()  # a model without weights is none
        if (self.out / CURVE).is_file():
            self._write([row for row in self.rows() if row["epoch"] <= epoch])

    def after(
        self, epoch: int, epochs: int, embed: Embed, save: Callable[[Path, dict[str, Any]], None]
    ) -> dict[str, Any] | None:
        """Score the model when it is due, and save it where it is better than all before; returns its numbers.

        Call it before the state of the run is saved: a run that is killed in between does the epoch again and comes
        here again. save(folder, facts): exports the model completely or not at all, the facts into its config. Of equal
        mAP the earlier epoch stays.
        """
        if not self.due(epoch, epochs):
            return None
        numbers = self.score(self.reader, self.split, embed, self.protocol).numbers()
        row, best = {"epoch": epoch, **numbers}, self.best()
        if best is None or row["mAP"] > best["mAP"]:
            save(self.out / BEST, {FOUND: row})
        self._write([*self.rows(), row])
        return row

    def calibration(self, embed: Embed) -> dict[str, Any]:
        """For the config of the model: its threshold for "same person", measured on the held-out identities.

        {} without validation, and where these are too few for a threshold, which is told then: a training that is done
        is not given up for that. The epoch may have been chosen on the same identities, so the rates are a little rosy.
        """
        if not self.config.identities:
            return {}
        names = dict.fromkeys(str(source.get("title", source["name"])) for source in self.reader.sources)
        title = f"{len(self.split.identities)} held-out training identities of {' + '.join(names)}"
        query, gallery = embed(self.reader, self.split.query), embed(self.reader, self.split.gallery)
        try:
            return {"calibration": calibrate(query, gallery, self.protocol, title=title).model_dump()}
        except UserError as error:
            print(f"no threshold for `same person` is stored with the model: {error}", file=sys.stderr)
            return {}

    def restore(self, model: nn.Module) -> dict[str, Any]:
        """At the end: put the weights of OUT/best into the model; returns what to tell about it, {} where none is."""
        best = self.best() if self.config.identities else None
        if best is None:
            return {}
        tensors, _ = load_model(self.out / BEST)
        model.load_state_dict({**model.state_dict(), **tensors})  # what is not exported stays
        return {FOUND: best}
