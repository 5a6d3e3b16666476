"""R22: files of every format that this project has written are read, or refused with a sentence on what to do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import killing
import numpy as np
import old_formats
import pytest
import small
from forked import Server
from safetensors.torch import load_file

from finetune import models
from finetune.augment import AugmentConfig
from finetune.backbones import BackboneConfig
from finetune.gallery import Gallery
from pretrain import checkpoint, committed
from recipes.errors import UserError
from shards.cfs import Scores
from shards.embeddings import EmbeddingTable
from shards.manifests import read_manifest
from shards.reader import ShardReader

PRETRAIN = ["schedules.epochs=1", "checkpoint.every_epochs=0.25", "checkpoint.keep=9"]  # a state each 2 of 8 steps
FINETUNE = ["optim.epochs=2", "resume.every_epochs=1", "resume.keep=9"]
OLDEST = (*old_formats.UNKNOWN_TO_1, "skipped")  # parts that the first release did not have


def names(out: Path) -> list[str]:
    return [state.name for state in checkpoint.states(out / "checkpoints")]


def back(out: Path, states: int, without: tuple[str, ...] = old_formats.UNKNOWN_TO_1) -> None:
    """A run as the old version would have left it after so many states: those of format 1, no results yet."""
    for number, state in enumerate(checkpoint.states(out / "checkpoints")):
        if number < states:
            old_formats.state_1(state, without)
        else:
            shutil.rmtree(state)
    for name in ("teacher", "teachers", "model", "results.json"):
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def differing(out: Path, alone: Path, model: str, parts: tuple[str, ...]) -> tuple[int, int]:
    """Lines or files lost, and lines or tensors that differ, but for these parts of the last state."""
    lost, wrong = killing.compare(out, alone, [f"{model}/model.safetensors"])
    ours, theirs = (load_file(run / "checkpoints" / names(alone)[-1] / checkpoint.TENSORS) for run in (out, alone))
    assert ours.keys() == theirs.keys()
    changed = [name for name in ours if not ours[name].equal(theirs[name])]
    return lost, wrong + sum(name.partition(".")[0] not in parts for name in changed)


@pytest.fixture(scope="module")
def pretrained(forks: Server, tmp_path_factory) -> tuple[list[str], Path]:
    """The command of a pretraining, and its folder."""
    crops, out = small.drawn(tmp_path_factory.getbasetemp(), small.UNLABELED), tmp_path_factory.mktemp("old") / "run"
    command = small.arguments("pretrain/run.py", out, crops, *PRETRAIN)
    run = forks.start(command)
    assert run.wait() == 0, run.told()
    return command, out


def moved(command: list[str], out: Path) -> list[str]:
    """The same command with another run folder."""
    place = command.index("--out") + 1
    return [*command[:place], str(out), *command[place + 1 :]]


@pytest.mark.row("R22")
@pytest.mark.parametrize(
    "without",
    [
        pytest.param(old_formats.UNKNOWN_TO_1, id="format 1", marks=pytest.mark.soak),
        pytest.param(OLDEST, id="first release"),
    ],
)
def test_a_pretraining_goes_on_from_a_state_of_format_1(pretrained, without, forks, tmp_path, figures):
    command, alone = pretrained
    out = shutil.copytree(alone, tmp_path / "run")
    back(out, 2, without)
    run = forks.start(moved(command, out))
    assert run.wait() == 0, run.told()
    assert len(small.metrics(out)) == 8
    assert names(out) == names(alone)
    lost, wrong = differing(out, alone, "teacher", old_formats.UNKNOWN_TO_1)
    figures("R22", injected="a state of format 1", times=1, lost=lost, wrong=wrong)
    assert (lost, wrong) == (0, 0)


@pytest.mark.row("R22")
def test_a_damaged_state_of_format_1_is_passed_over(pretrained, forks, tmp_path):
    """It has no sums, but a file that is cut off is seen when it is read."""
    command, alone = pretrained
    out = shutil.copytree(alone, tmp_path / "run")
    back(out, 3)
    tensors = checkpoint.states(out / "checkpoints")[-1] / checkpoint.TENSORS
    tensors.write_bytes(tensors.read_bytes()[:-100])
    run = forks.start(moved(command, out))
    assert run.wait() == 0, run.told()
    assert f"{tensors} is damaged" in run.told()
    assert differing(out, alone, "teacher", old_formats.UNKNOWN_TO_1) == (0, 0)


@pytest.mark.soak
@pytest.mark.row("R22")
def test_a_fine_tune_goes_on_from_a_state_of_format_1(forks, tmp_path, figures):
    people, alone = small.drawn(tmp_path, small.LABELLED), tmp_path / "alone"
    command = small.arguments("finetune/run.py", alone, people, *FINETUNE, ckpt="none")
    run = forks.start(command)
    assert run.wait() == 0, run.told()
    out = shutil.copytree(alone, tmp_path / "run")
    back(out, 1)
    run = forks.start(moved(command, out))
    assert run.wait() == 0, run.told()
    lost, wrong = differing(out, alone, "model", ())
    results = [small.json_of(folder / "results.json")["average_precision"] for folder in (out, alone)]
    wrong += results[0] != results[1]
    figures("R22", injected="a state of format 1 of a fine-tune", times=1, lost=lost, wrong=wrong)
    assert (lost, wrong) == (0, 0)
    old_formats.model_1(out / "model", first=True)
    old, new = (models.load_embedder(str(f), BackboneConfig(), AugmentConfig(), 0)[0] for f in (out, alone))
    assert models.fingerprint(old) == models.fingerprint(new)


@pytest.mark.row("R22")
def test_exported_models_without_sums_are_read(make_backbone, tmp_path):
    backbone = make_backbone()
    checkpoint.save_teacher(tmp_path / "new", backbone, {"seed": 0})
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    old_formats.model_1(tmp_path / "old")
    (new, facts), (old, told) = (checkpoint.load_backbone(tmp_path / name) for name in ("new", "old"))
    assert models.fingerprint(new.vit) == models.fingerprint(old.vit)
    assert facts == told


@pytest.mark.row("R22")
def test_files_as_they_were_released_are_read(tmp_path, figures):
    table = EmbeddingTable.load(old_formats.table_1(tmp_path / "table"))
    half = EmbeddingTable.load(old_formats.table_1(tmp_path / "half", "float16"))
    scores = Scores.load(old_formats.scores_1(tmp_path / "scores"))
    gallery = Gallery.load(old_formats.gallery_1(tmp_path / "gallery"))
    packed = ShardReader([old_formats.set_(tmp_path / "set", 2)], "train")
    for found in (table, half):
        assert np.array_equal(found.features, old_formats.features())
        assert found.pids.tolist() == [1, 2, 3]
        assert (list(found.keys), found.facts) == (old_formats.KEYS, {"made": 1})
    assert scores.values.tolist() == [0, 0.5, 1]
    assert list(gallery.columns.keys) == old_formats.KEYS
    cosines, ids = gallery.index.search(old_formats.features(), 1)
    assert ids.ravel().tolist() == [0, 1, 2]
    assert cosines.ravel().tolist() == [1, 1, 1]
    for row, key in enumerate(old_formats.KEYS):
        assert packed[row] == (key, old_formats.image_of(row), row + 1, row % 2, ())
    figures("R22", injected="table, scores, gallery, set as released", times=5, lost=0, wrong=0)


def sealed(folder: Path, tree: dict) -> None:
    """Rewrite the manifest of a state, with the sum that belongs to it."""
    tree = {key: value for key, value in tree.items() if key != committed.SUM}
    path = folder / checkpoint.MANIFEST
    path.write_text(json.dumps(tree))
    facts = committed._sum_of(tree)
    path.write_text(json.dumps({**tree, committed.SUM: facts}))


def plain(file: str) -> Callable[[Path, dict], None]:
    return lambda folder, tree: (folder / file).write_text(json.dumps(tree))


# what is read: how today's is made, its file with the version, how that is rewritten, who reads it
READERS = {
    "set": (lambda f: old_formats.set_(f, 2), "manifest.json", plain("manifest.json"), read_manifest),
    "table": (old_formats.table_1, "table.json", plain("table.json"), EmbeddingTable.load),
    "scores": (old_formats.scores_1, "scores.json", plain("scores.json"), Scores.load),
    "gallery": (old_formats.gallery_1, "gallery.json", plain("gallery.json"), Gallery.load),
    "state": (None, checkpoint.MANIFEST, sealed, checkpoint.read_state),
    "model": (None, checkpoint.CONFIG, plain(checkpoint.CONFIG), checkpoint.load_model),
}
VERSIONS = (0, 3, 99, -1, 10**30, 1.5, None, "one", [], {})


@pytest.mark.row("R22")
@pytest.mark.parametrize("kind", READERS)
def test_other_versions_are_refused(kind, make_student, tmp_path, figures):
    make, file, write, read = READERS[kind]
    folder = tmp_path / kind
    if kind == "state":
        student = make_student()
        checkpoint.save_state(tmp_path, {"student": student}, (student, []), 8, 1)
        folder = checkpoint.states(tmp_path)[0]
    elif kind == "model":
        checkpoint.save_teacher(folder, make_student().backbone, {})
    else:
        make(folder)
    read(folder)
    tree, crashes = small.json_of(folder / file), 0
    for version in VERSIONS:
        write(folder, tree | {"format_version": version})
        with pytest.raises(UserError) as caught:
            read(folder)
        told = str(caught.value)
        crashes += not (str(folder) in told and ("has format" in told or "is damaged" in told))
    figures("R22", injected=f"{kind} of another version", times=len(VERSIONS), lost=0, wrong=crashes)
    assert crashes == 0


@pytest.mark.row("R22")
def test_the_first_formats_of_sets_and_tables_are_refused_with_what_to_do(tmp_path):
    old = old_formats.set_(tmp_path / "set", 1)
    with pytest.raises(UserError) as caught:
        ShardReader([old], "train")
    assert str(caught.value) == f"{old}/manifest.json has format 1, this version reads 2; pack the set again"
    with pytest.raises(UserError, match=r"has no table\.json: it is no embedding table, .*; write it again"):
        EmbeddingTable.load(old_formats.table_0(tmp_path / "table"))
