"""R17: checkpoints of strangers, states and models that want to run programs, read other files or take all memory."""

import collections
import functools
import io
import json
import os
import pickle
import shutil
import warnings
import zipfile
from pathlib import Path

import pytest
import strangers
import torch
from fuzzing import as_json, zipped
from hostile import DEEP, Trap, put, survey, zip_bomb
from safetensors.torch import save_file

from finetune import models
from finetune.foreign import reid
from pretrain import checkpoint, foreign, model_config, untrusted
from recipes.errors import UserError

pytestmark = pytest.mark.row("R17")
LONG = pickle.dumps(1 << 31, 2)[2:-1]  # the codes of a large number


def saved(content, zip_: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zip_)
    return buffer.getvalue()


def packed(codes: bytes, zip_: bool = True) -> bytes:
    """A torch file around the codes of a pickle."""
    if zip_:
        return zipped({"a/data.pkl": b"\x80\x02" + codes, "a/version": b"3\n", "a/byteorder": b"little"})
    whole = saved({}, zip_=False)
    empty = pickle.dumps({}, 2)
    at = whole.rindex(empty)  # the pickle of the content stands in front of that of the keys of its tensors
    return whole[:at] + b"\x80\x02" + codes + whole[at + len(empty) :]


def twice(data: bytes) -> bytes:
    """A zip with one more entry of each name."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that names are there twice
        for entry in [*old.namelist(), *old.namelist()]:
            new.writestr(entry, old.read(entry))
    return buffer.getvalue()


def torch_files(sign: Path) -> dict[str, bytes]:
    backbone = strangers.backbone()
    weights = {key: value for key, value in backbone.items() if key != "norm.bias"}
    called = {
        "eval": b"cbuiltins\neval\n(X\x03\0\0\x001+1tR.",
        "a partial": pickle.dumps(functools.partial(os.system, f"touch {sign}"), 2)[2:],
        "torch.load": b"ctorch\nload\n(X\x01\0\0\0xtR.",
        "a default dict": pickle.dumps(collections.defaultdict(os.getpid), 2)[2:],
        "numpy's own way": b"cnumpy.core.multiarray\n_reconstruct\n.",
        "a dotted name": b"cargparse\nNamespace.__init__.__globals__\n.",
        "2 GB of a bytearray": b"cbuiltins\nbytearray\n" + LONG + b"\x85R.",
        "2 GB of a bytearray of Python 2": b"c__builtin__\nbytearray\n" + LONG + b"\x85R.",
        "tuples in tuples as a key": b"})" + b"\x85" * 200_000 + b"K\x01s.",
        "tuples in tuples, by notes": b"})" + b"q\x000h\x00\x85" * 200_000 + b"K\x01s.",
    }
    files = {
        f"{name}, {kind}": packed(codes, kind == "zip") for name, codes in called.items() for kind in ("zip", "old")
    }
    for kind in ("zip", "old"):
        files |= {
            f"runs a program, {kind}": saved({"model": Trap(sign)}, kind == "zip"),
            f"among weights, {kind}": saved({**backbone, "x": Trap(sign)}, kind == "zip"),
            f"in the optimiser, {kind}": saved({"teacher": backbone, "optimizer": [Trap(sign)]}, kind == "zip"),
            f"a view that claims 4 TB, {kind}": saved(
                {**weights, "norm.bias": torch.zeros(1).expand(10**12)}, kind == "zip"
            ),
            f"a sparse tensor, {kind}": saved({**weights, "norm.bias": torch.eye(3).to_sparse()}, kind == "zip"),
            f"a tensor without memory, {kind}": saved(
                {**weights, "norm.bias": torch.zeros(9, device="meta")}, kind == "zip"
            ),
        }
    whole = saved(backbone)
    large = whole.rindex(b"PK\6\6") + 40  # where the record at its end tells the bytes of the directory
    return files | {
        "a pickle, no torch file": pickle.dumps(Trap(sign), 2),
        "2 GB of zeros": zip_bomb("a/data.pkl", 2 << 30),
        "names twice": twice(whole),
        "a directory of 8 EB": whole[:large] + b"\xff" * 8 + whole[large + 8 :],
        "cut": whole[:-100],
        "a tensor moved away": whole.replace(b"/data/0", b"/data/x"),
    }


def tensor_files() -> dict[str, bytes]:
    def header(tree, length: int | None = None, data: bytes = bytes(8)) -> bytes:
        text = tree if isinstance(tree, bytes) else as_json(tree)
        return (len(text) if length is None else length).to_bytes(8, "little") + text + data

    one = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    return {
        "a header of 2^60 bytes": header({"a": one}, 1 << 60),
        "a header of 2^64 - 1 bytes": header({"a": one}, 2**64 - 1),
        "a header of 11 MB": header({str(n): {**one, "shape": [0], "data_offsets": [0, 0]} for n in range(150_000)}),
        "tensors over one another": header({"a": one, "b": one}),
        "a hole": header({"a": {**one, "data_offsets": [8, 16]}}, data=bytes(16)),
        "2^62 numbers": header({"a": {**one, "shape": [2**62]}}),
        "sides that overflow": header({"a": {**one, "shape": [2**32, 2**32, 4]}}),
        "offsets below 0": header({"a": {**one, "data_offsets": [-8, 0]}}),
        "an unknown type": header({"a": {**one, "dtype": "OBJECT"}}),
        "one name twice": header(b'{"a":' + as_json(one) + b',"a":' + as_json(one) + b"}"),
        "deep": header(DEEP.encode()),
        "nothing": b"",
    }


def test_checkpoints_of_strangers(tmp_path, figures):
    sign, cases = tmp_path / "sign", {}
    for number, (name, data) in enumerate(torch_files(sign).items()):
        path = put(tmp_path / f"{number}.pth", data)
        cases[name] = "refused", lambda path=path: foreign.read(path)
        if name.startswith(("runs a program", "among weights")):
            cases[f"{name}, as fine-tuned"] = "refused", lambda path=path: reid.read(path)
    for number, (name, data) in enumerate(tensor_files().items()):
        path = put(tmp_path / f"{number}.safetensors", data)
        cases[name] = "refused", lambda path=path: foreign.read(path)
    assert survey(cases) == []
    assert not sign.exists()
    figures("R17", injected="checkpoints of other projects", times=len(cases), lost=0, wrong=0)


def test_the_codes_reach_the_reader(tmp_path):
    """A plain dictionary in the same wrapping is read: the files above are refused for what is in them."""
    for kind in (True, False):
        path = put(tmp_path / "a.pth", packed(b"}X\x01\0\0\0aK\x07s.", kind))
        assert untrusted.read(path) == {"a": 7}


def test_states(tmp_path, figures):
    net = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(net.parameters())
    checkpoint.save_state(tmp_path / "whole", {"net": net}, (net, [optimizer]), 5, 2)
    whole = next((tmp_path / "whole").iterdir())
    told = json.loads((whole / "manifest.json").read_text())
    sound = next(iter(told["files"].values()))
    manifests = {
        **{
            f"names {name!r}": {**told, "files": {name: sound}}
            for name in ("../../x", "/etc/passwd", "..", "\0", "\ud800")
        },
        "names no files": {**told, "files": {}},
        "a size of -1": {**told, "files": {"tensors.safetensors": {"size": -1, "crc32": 0}}},
        "another format": {**told, "format_version": 10**30},
        "no object": [],
    }
    cases = {}
    for number, (name, tree) in enumerate(manifests.items()):
        for version in (2, 1):
            state = Path(shutil.copytree(whole, tmp_path / f"{number}-{version}" / whole.name))
            if isinstance(tree, dict):
                tree = {**tree, "crc32": checkpoint.committed._sum_of({k: v for k, v in tree.items() if k != "crc32"})}
            put(state / "manifest.json", as_json(tree))
            if version == 1:
                (state / "manifest.json").unlink()
                put(state / "state.json", as_json({**tree, "format_version": 1} if isinstance(tree, dict) else tree))
            given = (state, {"net": net}, (net, [optimizer]))
            # format 1 had no list of files
            expected = "refused" if version == 2 or not isinstance(tree, dict) else "refused or read"
            cases[f"{name}, format {version}"] = expected, lambda given=given: checkpoint.load_state(*given)
    for name, data in {"deep": DEEP, "three million lists": "[" + "[]," * 3_000_000 + "[]]", "text": b"\xff"}.items():
        state = Path(shutil.copytree(whole, tmp_path / name / whole.name))
        put(state / "manifest.json", data)
        cases[name] = "refused", lambda state=state: checkpoint.newest_sound(state.parent)
    assert survey(cases) == []
    figures("R17", injected="states of ours", times=len(cases), lost=0, wrong=0)


ASKED = {
    "another file": {"checkpoint_path": "/tmp/x.pth"},
    "weights from the network": {"pretrained": True},
    "a configuration": {"pretrained_cfg": {"url": "http://127.0.0.1/x"}},
    "a model of the Hub": {"model_name": "hf-hub:x/y"},
    "a folder": {"model_name": "local-dir:/tmp"},
    "no name": {"model_name": 7},
    "64 million blocks": {"depth": 1 << 26},
    "a width of a million": {"embed_dim": 10**6},
    "40 billion numbers": {"depth": 50, "embed_dim": 8192},
    "an image of a million pixels a side": {"img_size": [10**6, 10**6]},
    "an image of one side": {"img_size": 64},
    "patches of 0": {"patch_size": 0},
    "patches of two sides": {"patch_size": [8, 8]},
    "a network in a text": {"norm_layer": "__import__('os').system('x')"},
    "a mapping": {"norm_layer": {"a": 1}},
    "numbers that are none": {"mlp_ratio": float("nan")},
}


def test_arguments_of_models(make_backbone):
    sound = make_backbone().arguments
    assert model_config.model_arguments(sound, "x") == sound
    refused = []
    for name, change in ASKED.items():
        try:
            found = model_config.model_arguments(sound | change, "x")
            model_config.empty_model(
                lambda found=found: foreign.architecture.empty_vit(found), "x", {"a": torch.zeros(9)}
            )
        except UserError:
            refused.append(name)
    assert refused == [*ASKED]


def test_models(make_backbone, tmp_path, figures):
    backbone = make_backbone(masked=False)
    checkpoint.save_teacher(tmp_path / "sound", backbone, {"normalize": {"mean": [0.5] * 3, "std": [0.5] * 3}})
    told = json.loads((tmp_path / "sound" / "config.json").read_text())
    trees = {name: {**told, "timm": told["timm"] | change} for name, change in ASKED.items()}
    trees |= {
        "no arguments": {**told, "timm": None},
        "a list": [],
        "other means": {**told, "normalize": {"mean": ["x"] * 3, "std": [0.5] * 3}},
        "no means": {**told, "normalize": "x"},
        "a file elsewhere": {**told, "files": {"../../x": {"size": 1, "crc32": 1}}},
        "kind reid": {**told, "kind": "reid"},
        "a method that is a path": {**told, "kind": "reid", "method": {"name": "../../x"}, "classes": 3, "augment": {}},
        "10^12 classes": {**told, "kind": "reid", "method": {"name": "bot"}, "classes": 10**12, "augment": {}},
    }
    cases = {}
    texts = {name: as_json(tree) for name, tree in trees.items()}
    for number, (name, data) in enumerate(
        {**texts, "deep": DEEP, "text": b"\xff", "many": "[" + "[]," * 200_000 + "[]]"}.items()
    ):
        folder = Path(shutil.copytree(tmp_path / "sound", tmp_path / str(number)))
        put(folder / "config.json", data)
        cases[name] = "refused", lambda folder=folder: models.load_stored(str(folder))
        if name not in ("other means", "no means", "kind reid", "a method that is a path", "10^12 classes"):
            cases[f"{name}, backbone"] = "refused", lambda folder=folder: checkpoint.load_backbone(folder)
    for number, (name, data) in enumerate(tensor_files().items()):
        folder = Path(shutil.copytree(tmp_path / "sound", tmp_path / f"weights{number}"))
        put(folder / "config.json", as_json({key: value for key, value in told.items() if key != "files"}))
        put(folder / "model.safetensors", data)
        cases[f"weights: {name}"] = "refused", lambda folder=folder: checkpoint.load_backbone(folder)
    hub = tmp_path / "hub"
    hub.mkdir()
    save_file(backbone.vit.state_dict(), hub / "model.safetensors")
    for number, given in enumerate(({"checkpoint_path": "/tmp/x.pth"}, {"depth": 1 << 40}, {"patch_size": "x"}, 7)):
        folder = Path(shutil.copytree(hub, tmp_path / f"hub{number}"))
        put(folder / "config.json", as_json({"architecture": "vit_tiny_patch16_224", "model_args": given}))
        cases[f"of the Hub with {given}"] = "refused", lambda folder=folder: checkpoint.load_backbone(folder)
    assert survey(cases) == []
    figures("R17", injected="models of ours and of the Hub", times=len(cases), lost=0, wrong=0)
