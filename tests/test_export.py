"""Models out: an ONNX file that agrees with torch, a folder for the Hub, a foreign fine-tune in our own layout."""

import builtins
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import small
import strangers_reid
import torch
from strangers import written

from finetune import hub_folder, models, onnx_export
from finetune.augment import AugmentConfig
from finetune.plain_forward import PlainEmbedder
from recipes.errors import UserError

ALL = strangers_reid.strangers()
IMAGENET = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def export(*words: object) -> int:
    """Exit status of the script."""
    return small.run([str(small.ROOT / "finetune/export.py"), *map(str, words)])


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Path:
    """TransReID with cameras and jigsaw patches in our own layout, with a calibration."""
    folder = tmp_path_factory.mktemp("ours")
    path = written(folder, ALL["TransReID"].content)
    assert export("--ckpt", path, "--to", "ours", "--out", folder / "model") == 0
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(
        json.dumps(config | {"calibration": {"threshold": 0.625, "far": 0.001}})
    )
    return folder / "model"


@pytest.fixture(scope="module")
def onnx_file(ours) -> Path:
    """The same for trackers."""
    path = ours.parent / "model.onnx"
    assert export("--ckpt", ours, "--to", "onnx", "--input", "imagenet", "--out", path) == 0
    return path


def pixels(count: int) -> torch.Tensor:
    """Images in 0..1, float32 [count, 3, 256, 128]."""
    return torch.rand(count, 3, 256, 128, generator=torch.Generator().manual_seed(count))


def test_our_own_layout_is_the_same_model(ours, tmp_path):
    path = written(tmp_path, ALL["TransReID"].content)
    (one, augment), (other, same) = models.load_stored(path), models.load_stored(str(ours))
    assert models.fingerprint(one) == models.fingerprint(other)
    assert augment == same
    assert models.fine_tuned(str(ours))[1]["source"].startswith("75 tensors of file.pth (TransReID, jigsaw patches)")


@torch.no_grad()
def test_the_file_takes_any_number_of_images_as_trackers_prepare_them(ours, onnx_file):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
    (image,), (feature,) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.shape, image.type) == ("images", ["batch", 3, 256, 128], "tensor(float)")
    assert (feature.name, feature.shape) == ("features", ["batch", 5 * strangers_reid.DIM])
    model = models.load_stored(str(ours))[0].eval()
    for count in (1, 2, 5):
        images = pixels(count)
        (found,) = session.run(None, {"images": ((images - IMAGENET[0]) / IMAGENET[1]).numpy()})
        assert np.allclose(found, model.embed((images - 0.5) / 0.5).numpy(), atol=1e-5)
        assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_the_file_tells_what_it_needs(ours, onnx_file):
    onnx = pytest.importorskip("onnx")
    content = onnx.load(onnx_file)
    told = {entry.key: entry.value for entry in content.metadata_props}
    assert (told["height"], told["width"], told["input"], told["channels"]) == ("256", "128", "imagenet", "RGB")
    assert json.loads(told["mean"]) == [123.675, 116.28, 103.53]
    assert json.loads(told["std"]) == [58.395, 57.12, 57.375]
    assert (told["threshold"], json.loads(told["calibration"])["far"]) == ("0.625", 0.001)
    assert told["fingerprint"] == models.fingerprint(models.load_stored(str(ours))[0])
    assert [entry.version for entry in content.opset_import if entry.domain == ""] == [onnx_export.OPSET]


def test_a_file_that_disagrees_is_not_written(ours, onnx_file, tmp_path, monkeypatch):
    model, augment = models.load_stored(str(ours))
    monkeypatch.setattr(onnx_export, "_traced", lambda plain, augment, path: shutil.copy(onnx_file, path))
    done = onnx_export.write(tmp_path / "good.onnx", model, augment, {}, "title", "imagenet")
    assert min(done.cosine.values()) >= 0.9999
    monkeypatch.setattr(onnx_export, "COSINE", 1.5)
    with pytest.raises(UserError, match=r"does not give the features of the model .* nothing is written"):
        onnx_export.write(tmp_path / "bad.onnx", model, augment, {}, "title", "imagenet")
    assert [entry.name for entry in tmp_path.iterdir()] == ["good.onnx"]


def test_the_check_sees_other_features(ours, onnx_file):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
    model, augment = models.load_stored(str(ours))
    model.eval()
    right = onnx_export.agreement(session, model, augment, "imagenet")
    assert right.keys() == {"random", "drawn"}
    wrong = onnx_export.agreement(session, model, augment, "pixels")
    assert min(right.values()) > 0.999999 > max(wrong.values())
    with torch.no_grad():
        model.jpm.norm.weight.fill_(float("nan"))
    broken = onnx_export.agreement(session, model, augment, "imagenet")
    assert all(np.isnan(value) for value in broken.values())


@pytest.mark.parametrize("kind", ["PersonViT", "TransReID-SSL ICS", "TransReID", "PASS", "fast-reid IBN GeM"])
@torch.no_grad()
def test_plain_operations_give_the_same_features(kind, tmp_path):
    model, augment = models.load_stored(written(tmp_path, ALL[kind].content))
    model.eval()
    images = torch.rand(2, 3, 256, 128, generator=torch.Generator().manual_seed(0))
    own = {"mean": augment.mean, "std": augment.std}
    mean, std = (torch.tensor(own[key])[:, None, None] for key in ("mean", "std"))
    wanted = model.embed((images - mean) / std)
    before = models.fingerprint(model)
    for prepared, given in (
        ("own", (images - mean) / std),
        ("imagenet", (images - IMAGENET[0]) / IMAGENET[1]),
        ("pixels", images * 255),
    ):
        assert torch.allclose(PlainEmbedder(model, own, prepared)(given), wanted, atol=1e-5), prepared
    assert models.fingerprint(model) == before
    assert torch.equal(model.embed((images - mean) / std), wanted)  # and still runs as it did


def test_a_folder_for_the_hub(ours, tmp_path, capsys):
    results = {"mAP": 0.8512, "rank1": 0.9388, "rank5": 0.97, "mINP": 0.5, "data": ["Market-1501"]}
    (ours / "results.json").write_text(json.dumps(results))
    (ours / "duke").mkdir()
    (ours / "duke" / "results.json").write_text(json.dumps({**results, "mAP": 0.7, "data": None}))
    (ours / "duke" / "other.json").write_text("{}")
    assert export("--ckpt", ours, "--to", "hub", "--out", tmp_path / "hub") == 0
    assert "320 numbers" in capsys.readouterr().out
    card = (tmp_path / "hub" / "README.md").read_text()
    for part in (
        "256 x 128 pixels (height x width) by 320 numbers",
        "| Market-1501 | 85.1 | 93.9 | 97.0 | 50.0 |",
        "| duke | 70.0 | 93.9 | 97.0 | 50.0 |",
        "| same person at a cosine of | 0.625 |",
        'Extractor("hub:OWNER/NAME")',
        "Licence",
    ):
        assert part in card
    again, augment = models.load_stored(str(tmp_path / "hub"))
    assert models.fingerprint(again) == models.fingerprint(models.load_stored(str(ours))[0])
    assert augment.height == 256
    assert hub_folder.results_of(tmp_path) == hub_folder.NONE


def test_a_foreign_file_is_told_and_nothing_is_written(tmp_path, capsys):
    path = written(tmp_path, ALL["fast-reid"].content)
    assert export("--ckpt", path) == 0
    out = capsys.readouterr().out
    assert "taken      126 tensors of the model" in out
    assert "last stride 1, which no file tells" in out
    assert "reid_resnet: 256 x 128 pixels -> 512 numbers" in out
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.pth"]
    chosen = ("--size", 128, 64, "--feature", "before", "--last-stride", 2, "--normalize", "halves")
    assert export("--ckpt", path, *chosen, "--out", tmp_path / "chosen") == 0
    model, augment = models.load_stored(str(tmp_path / "chosen"))
    assert (augment.height, augment.mean, model.neck.feature) == (128, (0.5, 0.5, 0.5), "before")
    assert model.backbone.arguments["last_stride"] == 2


def test_what_is_refused_says_what_to_do(ours, make_backbone, tmp_path, capsys):
    models.save_model(tmp_path / "teacher", make_backbone().vit.state_dict(),
                      {"kind": "backbone", "timm": make_backbone().arguments})  # fmt: skip
    bare = written(tmp_path, strangers_reid.backbone(strangers_reid.TALL), "bare.pth")
    for words, told in (
        (("--ckpt", tmp_path / "teacher", "--to", "hub"), "--to hub of a teacher: pretrain/convert.py"),
        (("--ckpt", ours, "--size", 256, 128), "are for files of other projects"),
        (("--ckpt", bare, "--feature", "after"), "is no model that was fine-tuned for re-identification elsewhere"),
        (("--ckpt", ours, "--to", "hub", "--out", ours), "exists and is no empty folder"),
        (("--ckpt", ours, "--to", "onnx", "--out", tmp_path), "is a folder; --to onnx writes a file"),
        (("--ckpt", tmp_path / "nothing"), "is no checkpoint"),
    ):
        assert export(*words) == 2
        assert told in capsys.readouterr().err


def test_without_onnx_the_sentence_says_how_to_get_it(ours, tmp_path, capsys, monkeypatch):
    real = builtins.__import__

    def without(name, *more):
        if name == "onnxruntime":
            raise ImportError("no module", name=name)
        return real(name, *more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert export("--ckpt", ours, "--to", "onnx", "--out", tmp_path / "x.onnx") == 2
    assert "--to onnx needs onnxruntime: pip install 'personssl[onnx]'" in capsys.readouterr().err


def test_views_of_the_check():
    augment = AugmentConfig(height=64, width=32)
    random, drawn = (onnx_export.views(augment, 3, kind) for kind in ("random", "drawn"))
    assert random.shape == drawn.shape == (3, 3, 64, 32)
    for images in (random, drawn):
        assert 0 <= images.min() < images.max() <= 255
        assert images.std() > 10


@pytest.mark.soak
@pytest.mark.parametrize("kind", ALL)
def test_every_kind_becomes_onnx(kind, tmp_path):
    path = written(tmp_path, ALL[kind].content)
    for prepared in ("own", "pixels"):
        out = tmp_path / f"{prepared}.onnx"
        assert export("--ckpt", path, "--to", "onnx", "--input", prepared, "--out", out) == 0
        assert out.is_file()
