"""Thousands of damaged and made-up checkpoints: states of a run, exported models, files of other projects."""

import io
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import strangers
import torch
from fuzzing import TOKENS, Reader, as_json, changed_bytes, changed_trees, filed, fuzz_all, zipped
from hypothesis import strategies as st
from torch import Tensor, nn

from finetune import models
from finetune.foreign import reid
from pretrain import checkpoint, committed, foreign
from pretrain.backbone import Backbone

Inputs = list[tuple[st.SearchStrategy, Reader]]
TIMES = pytest.mark.parametrize("times", [100, pytest.param(5_000, marks=pytest.mark.soak)])


def sealed(tree: Any) -> bytes:
    """A manifest with the right sum of itself."""
    if isinstance(tree, dict):
        tree = {key: value for key, value in tree.items() if key != "crc32"}
        try:
            tree["crc32"] = committed._sum_of(tree)
        except ValueError:  # a lone surrogate
            tree["crc32"] = 0
    return as_json(tree)


def states(folder: Path) -> Inputs:
    net = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    facts = {"epoch": 1, "recipe": {"a": {"b": 1}}}
    checkpoint.save_state(folder, {"net": net}, (net, [optimizer]), 5, 2, **facts)
    state = next(folder.iterdir())
    manifest, tensors = state / "manifest.json", state / "tensors.safetensors"
    whole, numbers = manifest.read_bytes(), tensors.read_bytes()
    told, start = json.loads(whole), 8 + int.from_bytes(numbers[:8], "little")

    def read(given: bytes, data: bytes = numbers) -> None:
        manifest.write_bytes(given)
        tensors.write_bytes(data)
        checkpoint.load_state(state, {"net": net}, (net, [optimizer]), ({"a": {"b": 1}}, ()))

    def with_right_sums(data: bytes) -> None:
        files = {tensors.name: {"size": len(data), "crc32": zlib.crc32(data)}}
        read(sealed({**told, "files": files}), data)

    def with_header(tree: Any) -> None:
        header = as_json(tree)
        with_right_sums(len(header).to_bytes(8, "little") + header + numbers[start:])

    return [
        (changed_bytes([whole]), read),
        (changed_bytes([numbers]), lambda data: read(whole, data)),
        (changed_trees(told).map(sealed), read),
        (changed_bytes([numbers]), with_right_sums),
        (changed_trees(json.loads(numbers[8:start])), with_header),
    ]


def first_format(folder: Path) -> Inputs:
    """States of format 1: `state.json`, without sums."""
    net = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(net.parameters())
    checkpoint.save_state(folder, {"net": net}, (net, [optimizer]), 5, 2, epoch=1)
    state = next(folder.iterdir())
    told = json.loads((state / "manifest.json").read_text())
    (state / "manifest.json").unlink()
    told = {key: value for key, value in told.items() if key not in ("files", "crc32")} | {"format_version": 1}

    def load(_: Path) -> None:
        checkpoint.load_state(state, {"net": net}, (net, [optimizer]), ({"a": 1}, ()))

    read = filed(state / "state.json", load)
    return [(changed_bytes([as_json(told)]), read), (changed_trees(told).map(as_json), read)]


def saved(content: Any, zip_: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zip_)
    return buffer.getvalue()


def repacked(whole: bytes, codes: bytes) -> bytes:
    """A torch file with another pickle in it."""
    with zipfile.ZipFile(io.BytesIO(whole)) as file:
        return zipped({name: codes if name.endswith("data.pkl") else file.read(name) for name in file.namelist()})


def codes_of(whole: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(whole)) as file:
        return file.read(next(name for name in file.namelist() if name.endswith("data.pkl")))


CODES = [b"cos\nsystem\n", b"R", b"b", b"(", b"t", b"}", b"]", b"2", b"0", b"h\0", b"K\1", b"N", b"\x88", b"\x85", b"."]
CODES += [b"cargparse\nNamespace\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"cnumpy\ndtype\n", b"cbuiltins\nset\n"]
KINDS = ("DINO", "iBOT", "PersonViT", "DINOv2 in chunks", "PASS", "MSN", "TransReID-SSL")


def odd_tensors() -> list[Any]:
    """What stands where a weight was expected."""
    kinds = (torch.int64, torch.complex64, torch.bool, torch.bfloat16)
    flat: list[Tensor] = [torch.zeros(64, dtype=kind) for kind in kinds]
    shaped = [torch.zeros(shape) for shape in ((0,), (1,), (1, 1, 64), (2, 2, 2, 2), (), (1, 300, 64))]
    strange = [
        torch.eye(3).to_sparse(),
        torch.zeros(1).expand(10**6),
        torch.zeros(9, device="meta"),
        nn.Parameter(flat[3]),
    ]
    return [*flat, *shaped, *strange, None, 1, "x", [], {}, {"a": torch.zeros(1)}]


def of_strangers(tmp_path: Path) -> Inputs:
    made = strangers.strangers()
    contents = [made[kind].content for kind in KINDS]
    small = [{k: v for k, v in content.items() if k not in ("optimizer", "args")} for content in contents]
    files = [saved(content, zip_) for content in contents for zip_ in (True, False)]
    whole = [data for data in files if data.startswith(b"PK")]
    codes = st.one_of(
        changed_bytes([codes_of(data)], [*TOKENS, *CODES]).map(lambda codes, data=data: repacked(data, codes))
        for data in whole
    )
    trees = st.one_of(changed_trees(content, odd_tensors()).map(saved) for content in small)
    both = [filed(tmp_path / "file.pth", read) for read in (foreign.read, reid.read)]
    return [(inputs, read) for inputs in (changed_bytes(files), codes, trees) for read in both]


def exported(tmp_path: Path, backbone: Backbone) -> Inputs:
    folder = tmp_path / "teacher"
    checkpoint.save_teacher(folder, backbone, {"normalize": {"mean": [0.5] * 3, "std": [0.5] * 3}, "samples": 5})
    config, weights = folder / "config.json", folder / "model.safetensors"
    told, numbers = json.loads(config.read_text()), weights.read_bytes()
    free = {key: value for key, value in told.items() if key != "files"}

    def read(given: bytes, data: bytes = numbers) -> None:
        config.write_bytes(given)
        weights.write_bytes(data)
        checkpoint.load_backbone(folder)

    def embed(given: bytes) -> None:
        config.write_bytes(given)
        weights.write_bytes(numbers)
        models.load_stored(str(folder))

    return [
        (changed_trees(free).map(as_json), read),
        (changed_trees(told).map(as_json), read),
        (
            changed_trees({**free, "kind": "reid", "method": {"name": "bot"}, "classes": 3, "augment": {}}).map(
                as_json
            ),
            embed,
        ),
        (changed_trees(free).map(as_json), embed),
        (changed_bytes([as_json(free)]), embed),
        (changed_bytes([numbers]), lambda data: read(as_json(free), data)),
    ]


@pytest.mark.row("R17")
@TIMES
@pytest.mark.parametrize("inputs", [states, first_format, of_strangers], ids=["states", "format 1", "strangers"])
def test_checkpoints(inputs, times, tmp_path, figures):
    torch.manual_seed(0)
    fuzz_all(f"checkpoint reader, {inputs.__name__.replace('_', ' ')}", inputs(tmp_path), times, figures)


@pytest.mark.row("R17")
@TIMES
def test_exported_models(times, tmp_path, make_backbone, figures):
    fuzz_all("model reader", exported(tmp_path, make_backbone(masked=False)), times, figures)
