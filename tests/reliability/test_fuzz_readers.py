"""R17, the fuzzing: thousands of changed files for the readers of recipes, indexes, manifests, keep-lists, checkpoints.

A reader may read a file or refuse it with a sentence; anything else is a crash, and ends the test with the smallest
input that does it.
"""

import io
import json
import pickle
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import fuzzing
import numpy as np
import pytest
import torch
import yaml
from hypothesis import strategies as st
from strangers import backbone

from pretrain import checkpoint, committed, foreign
from pretrain.config import PretrainConfig
from recipes.load import dump, load, recipe_path
from shards import index, keep_list
from shards.manifests import read_manifest
from shards.reader import ShardReader

QUICK, MANY = 60, 5_000
ZIPPED = "_use_new_zipfile_serialization"  # of torch.save; False: the older format


class Target(NamedTuple):
    """A reader, and what to give it."""

    inputs: st.SearchStrategy
    read: Callable[[bytes], object]


def as_yaml(tree: Any) -> bytes:
    """A tree as YAML where YAML can say it."""
    return fuzzing.as_json(tree)


def recipes(folder: Path, _: Path, __: Any) -> Target:
    """Bytes of a shipped file, and trees."""
    shipped = [recipe_path("pretrain/smoke.yaml").read_bytes()]
    tree = yaml.safe_load(dump(load(PretrainConfig, "pretrain/smoke.yaml")))
    tokens = [*fuzzing.TOKENS, b"!!python/object/apply:os.system [x]", b"&a [*a]", b"*a", b"<<: ", b"? ", b"- ", b"\t"]
    inputs = fuzzing.changed_bytes(shipped, tokens) | fuzzing.changed_trees(tree).map(as_yaml)

    def read(data: bytes) -> None:
        path = folder / "recipe.yaml"
        path.write_bytes(data)
        load(PretrainConfig, path)

    return Target(inputs, read)


def indexes(folder: Path, small_set: Path, _: Any) -> Target:
    """The index of a packed set, and headers that claim what they like."""
    valid = next(iter(sorted(small_set.glob("*.npy")))).read_bytes()
    rows = index.load(next(iter(sorted(small_set.glob("*.npy")))))
    shapes = st.sampled_from([(10**12,), (-1,), (2**63,), (1, 1), (), (3,), 7, "x", ((1,),)])
    types = st.sampled_from(["O", "|O", "<f8", "S99999999999", rows.dtype.descr, [("key", "S4")], "V8", 3])
    claimed = st.builds(fuzzing.npy_claiming, types, shapes, st.binary(max_size=64), st.booleans())

    def read(data: bytes) -> None:
        path = folder / "index.npy"
        path.write_bytes(data)
        index.load(path)

    return Target(fuzzing.changed_bytes([valid]) | claimed, read)


def manifests(folder: Path, small_set: Path, _: Any) -> Target:
    valid = (small_set / "manifest.json").read_bytes()
    tree = yaml.safe_load(valid)

    def read(data: bytes) -> None:
        (folder / "manifest.json").write_bytes(data)
        read_manifest(folder)

    return Target(fuzzing.changed_bytes([valid]) | fuzzing.changed_trees(tree).map(fuzzing.as_json), read)


def keep_lists(folder: Path, small_set: Path, _: Any) -> Target:
    """All three kinds; the last byte says which."""
    reader = ShardReader([small_set], "train")
    names = [key.decode() for key in reader.keys[:20]]
    rows = {"rows": fuzzing.npy(np.arange(20)), "facts": fuzzing.npy(np.array('{"set": {}}'))}
    buffer = io.BytesIO()
    np.savez(buffer, rows=np.arange(20), facts=np.array('{"set": {}}'))
    bases = {
        b"z": [buffer.getvalue(), fuzzing.zipped({f"{k}.npy": v for k, v in rows.items()}, zipfile.ZIP_DEFLATED)],
        b"p": [pickle.dumps(names, protocol) for protocol in (0, 2, 4)],
        b"t": ["\n".join(names).encode()],
    }
    endings = {b"z": ".npz", b"p": ".pkl", b"t": ".txt"}
    inputs = st.one_of(*(fuzzing.changed_bytes(files).map(lambda d, k=kind: d + k) for kind, files in bases.items()))

    def read(data: bytes) -> None:
        path = folder / f"keep{endings[data[-1:]]}"
        path.write_bytes(data[:-1])
        keep_list.load(path, reader)

    return Target(inputs, read)


def states(folder: Path, _: Path, make_student: Any) -> Target:
    """The manifest of a state, with a sum that is right, so that what lies behind it is reached."""
    student = make_student()
    checkpoint.save_state(folder, {"student": student}, (student, []), 8, 1)
    state = checkpoint.states(folder)[0]
    valid = (state / checkpoint.MANIFEST).read_bytes()
    tree = {key: value for key, value in yaml.safe_load(valid).items() if key != committed.SUM}

    def summed(changed: Any) -> bytes:
        if not isinstance(changed, dict):
            return fuzzing.as_json(changed)
        plain = fuzzing.as_json(changed)
        told = zlib.crc32(as_summed(plain))
        return plain.rstrip()[:-1] + f', "{committed.SUM}": {told}}}'.encode()

    def read(data: bytes) -> None:
        (state / checkpoint.MANIFEST).write_bytes(data)
        checkpoint.load_state(state, {"student": student}, (student, []), ({"a": 1}, ()))

    return Target(fuzzing.changed_bytes([valid]) | fuzzing.changed_trees(tree).map(summed), read)


def as_summed(data: bytes) -> bytes:
    """The JSON as committed.py sums it up; data that Python cannot read stay as they are."""
    try:
        return json.dumps(json.loads(data), sort_keys=True, separators=(",", ":")).encode()
    except (ValueError, RecursionError):
        return data


def weights(folder: Path, _: Path, make_student: Any) -> Target:
    """A teacher's weights without their sum, as a model that was made by hand has them."""
    checkpoint.save_teacher(folder / "teacher", make_student().backbone, {})
    config = yaml.safe_load((folder / "teacher" / checkpoint.CONFIG).read_bytes())
    config.pop(committed.FILES)
    (folder / "teacher" / checkpoint.CONFIG).write_bytes(fuzzing.as_json(config))
    path = folder / "teacher" / checkpoint.WEIGHTS
    valid = path.read_bytes()

    def read(data: bytes) -> None:
        path.write_bytes(data)
        checkpoint.load_backbone(folder / "teacher")

    return Target(fuzzing.changed_bytes([valid]), read)


def strangers(folder: Path, _: Path, __: Any) -> Target:
    """Files of other projects, in both formats of torch."""
    bases = []
    for new in (True, False):
        buffer = io.BytesIO()
        torch.save({"teacher": {f"backbone.{k}": v for k, v in backbone().items()}}, buffer, **{ZIPPED: new})
        bases.append(buffer.getvalue())

    def read(data: bytes) -> None:
        path = folder / "checkpoint.pth"
        path.write_bytes(data)
        foreign.read(path)

    return Target(fuzzing.changed_bytes(bases), read)


TARGETS = {
    "recipe": recipes,
    "index": indexes,
    "manifest of a set": manifests,
    "keep-list": keep_lists,
    "manifest of a checkpoint": states,
    "weights of a model": weights,
    "file of another project": strangers,
}


def fuzzed(name: str, times: int, tmp_path: Path, small_set: Path, make_student: Any, figures: Any) -> None:
    target = TARGETS[name](tmp_path, small_set, make_student)
    counts = fuzzing.fuzz(target.inputs, target.read, times)
    assert counts.refused > counts.tried // 10, "the changes must hit something"
    assert counts.taken > 0, "what is valid must be read"
    figures("R17", injected=f"fuzzing: {name}", times=counts.tried, lost=0, wrong=0, note=str(counts))


@pytest.mark.row("R17")
@pytest.mark.parametrize("name", TARGETS)
def test_changed_files_are_read_or_refused(name, tmp_path, small_set, make_student, figures):
    fuzzed(name, QUICK, tmp_path, small_set, make_student, figures)


@pytest.mark.soak
@pytest.mark.row("R17")
@pytest.mark.parametrize("name", TARGETS)
def test_many_changed_files_are_read_or_refused(name, tmp_path, small_set, make_student, figures):
    fuzzed(name, MANY, tmp_path, small_set, make_student, figures)
