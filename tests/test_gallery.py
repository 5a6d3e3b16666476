"""A gallery on disk: images find themselves, ids stay, and whoever reads it meets the old one or the new one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small
import torch
from PIL import Image

from finetune import gallery_files
from finetune.extractor import Extractor
from finetune.gallery import Gallery
from finetune.gallery_files import Columns, generation, writing
from finetune.gallery_sources import open_source
from pretrain.backbone import Backbone, BackboneConfig, timm_arguments
from pretrain.checkpoint import save_teacher
from recipes.errors import UserError
from shards.embeddings import EmbeddingTable
from shards.reader import ShardReader


@pytest.fixture(scope="module")
def extractor(tmp_path_factory) -> Extractor:
    return an_extractor(tmp_path_factory.mktemp("teacher"), 0)


def an_extractor(folder: Path, seed: int, **more) -> Extractor:
    torch.manual_seed(seed)
    config = BackboneConfig(name="vit_tiny_patch16_224", patch_size=8, embed_dim=32, depth=2, num_heads=2)
    backbone = Backbone(timm_arguments(config, (48, 16)))
    backbone.initialise("fan_in")
    save_teacher(folder / "teacher", backbone, {})
    return Extractor(folder, device="cpu", **more)


@pytest.fixture
def crops(tmp_path) -> Path:
    """Twelve images in two folders, and what else lies in folders."""
    for number in range(12):
        folder = tmp_path / "crops" / f"cam {number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (6, 2, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((20, 60)).save(folder / f"p{number:02d}.png")
    (tmp_path / "crops" / "notes.txt").write_text("no image")
    return tmp_path / "crops"


def quiet(_: str) -> None:
    """Nobody listens."""


def self_found(gallery: Gallery, extractor: Extractor, crops: Path) -> list[str]:
    """Images of the folder that find themselves first, by their path."""
    paths = sorted(crops.rglob("*.png"))
    found = gallery.search(extractor(paths), 1)
    return [path.name for path, (best,) in zip(paths, found, strict=True) if best.name == str(path)]


@pytest.mark.parametrize("factory", [None, "IVF2,SQ8"])
def test_build_add_remove(extractor, crops, tmp_path, factory):
    late = [crops / "cam 0" / "p10.png", crops / "cam 1" / "p11.png"]
    for path in late:
        path.rename(tmp_path / path.name)
    out = tmp_path / "gallery"
    gallery = Gallery.build(out, extractor, [open_source(str(crops))], factory, quiet)
    assert len(gallery) == 10
    assert [len(gallery.facts["sources"]), gallery.facts["factory"]] == [1, factory or "Flat"]
    for path in late:
        (tmp_path / path.name).rename(path)
    gallery = Gallery.load(out).add(extractor, [open_source(str(crops)), open_source(str(crops))], quiet)
    assert len(gallery) == 12
    np.testing.assert_array_equal(gallery.columns.ids, range(12))
    assert len(self_found(Gallery.load(out), extractor, crops)) == 12
    before = dict(zip(gallery.columns.keys, gallery.columns.ids.tolist(), strict=True))
    gone = Gallery.load(out).called(str(crops / "cam 1")) | Gallery.load(out).called("*p04.png")
    gallery = Gallery.load(out).remove(gone)
    assert sorted(gallery.columns.keys) == [f"cam 0/p{n:02d}.png" for n in (0, 2, 6, 8, 10)]
    assert {key: before[key] for key in gallery.columns.keys} == dict(
        zip(gallery.columns.keys, gallery.columns.ids.tolist(), strict=True)
    )
    assert len(self_found(Gallery.load(out), extractor, crops)) == 5
    again = Gallery.load(out).add(extractor, [open_source(str(late[1]))], quiet)
    assert again.columns.ids[-1] == 12, "an id is not given twice"
    assert len(self_found(Gallery.load(out), extractor, crops)) == 6
    assert sorted(path.name for path in out.iterdir()) == [".lock", "gallery.json", "generation-000004"]
    assert (generation(out, 4) / "vectors.f32").exists() == (factory is not None)


def test_nothing_new_changes_nothing(extractor, crops, tmp_path):
    out, told = tmp_path / "gallery", []
    Gallery.build(out, extractor, [open_source(str(crops))], None, quiet)
    before = (out / "gallery.json").read_bytes()
    Gallery.load(out).add(extractor, [open_source(str(crops))], told.append)
    assert told == ["nothing was added: these images are in the gallery already, or cannot be read"]
    assert (out / "gallery.json").read_bytes() == before


def test_damaged_images_are_named_and_counted(extractor, crops, tmp_path):
    (crops / "cam 0" / "p00.png").write_bytes(b"broken")
    told: list[str] = []
    gallery = Gallery.build(tmp_path / "gallery", extractor, [open_source(str(crops))], None, told.append)
    assert told[0] == f"left out: {crops}/cam 0/p00.png is not a JPEG, PNG, WebP or BMP image"
    assert told[1] == f"1 of 12 images of {crops} cannot be read, left out"
    assert [gallery.facts["skipped"], len(gallery)] == [1, 11]
    assert len(self_found(gallery, extractor, crops / "cam 1")) == 6, "the others keep their names"
    for path in crops.rglob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(UserError, match="none of the images can be read"):
        Gallery.build(tmp_path / "other", extractor, [open_source(str(crops))], None, quiet)


def test_another_model_or_input_is_refused(extractor, crops, tmp_path):
    Gallery.build(tmp_path / "gallery", extractor, [open_source(str(crops))], None, quiet)
    gallery = Gallery.load(tmp_path / "gallery")
    gallery.check(extractor)
    with pytest.raises(UserError, match=r"was built with .* \(fingerprint: other weights\)"):
        gallery.check(an_extractor(tmp_path / "other", 1))
    with pytest.raises(UserError, match=r"input: .*'flip': False.* not .*'flip': True"):
        gallery.check(Extractor(extractor.ckpt, device="cpu", flip=True))
    shutil.copytree(extractor.ckpt, tmp_path / "moved")
    gallery.check(Extractor(tmp_path / "moved", device="cpu"))


def test_a_packed_set_and_its_table_give_the_same_gallery(extractor, tmp_path, tmp_path_factory):
    data = small.drawn(tmp_path_factory.getbasetemp(), small.LABELLED)
    source = open_source(str(data), ["gallery"])
    reader = ShardReader([data], "gallery")
    images = Gallery.build(tmp_path / "images", extractor, [source], None, quiet)
    np.testing.assert_array_equal(images.columns.pids, reader.pids)
    np.testing.assert_array_equal(images.columns.camids, reader.camids)
    features = extractor([source.picture(row) for row in range(len(reader))])
    facts = {
        "model": extractor.fingerprint,
        "input": {
            name: list(v) if isinstance(v, tuple) else v for name, v in extractor.input.items() if name != "flip"
        },
    }
    table = EmbeddingTable(features, reader.pids, reader.camids, reader.keys, facts)
    table.save(tmp_path / "table")
    tables = Gallery.build(tmp_path / "tables", extractor, [open_source(str(tmp_path / "table"))], None, quiet)
    for answers in (images.search(features, 3), tables.search(features, 3)):
        assert [answer.key for answer, *_ in answers] == source.keys
        assert [answer.pid for answer, *_ in answers] == reader.pids.tolist()
    with pytest.raises(UserError, match="was not embedded with"):
        Gallery.build(tmp_path / "no", an_extractor(tmp_path, 1), [open_source(str(tmp_path / "table"))], None, quiet)


def test_a_kill_while_writing_leaves_the_old_gallery(extractor, crops, tmp_path, monkeypatch):
    out = tmp_path / "gallery"
    part = open_source(str(crops / "cam 0"))
    Gallery.build(out, extractor, [part], None, quiet)
    for name in ("write_json", "write_array"):  # before the swap, and amid the files of the new generation
        with monkeypatch.context() as patch:
            patch.setattr(gallery_files, name, killed)
            with pytest.raises(KeyboardInterrupt):
                Gallery.load(out).add(extractor, [open_source(str(crops / "cam 1"))], quiet)
        assert generation(out, 2).is_dir()
        assert len(Gallery.load(out)) == 6
    with monkeypatch.context() as patch:  # after the swap: the old generation is left over
        patch.setattr(gallery_files.shutil, "rmtree", killed_unless_draft)
        with pytest.raises(KeyboardInterrupt):
            Gallery.load(out).add(extractor, [open_source(str(crops / "cam 1"))], quiet)
    assert len(Gallery.load(out)) == 12
    Gallery.load(out).remove(Gallery.load(out).called("*p03.png"))
    assert [path.name for path in out.glob("generation-*")] == ["generation-000003"]
    assert len(self_found(Gallery.load(out), extractor, crops)) == 11


def killed(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def killed_unless_draft(path: Path, *_: object, **__: object) -> None:
    if path.name == "generation-000001":
        raise KeyboardInterrupt
    subprocess.run(["rm", "-rf", str(path)], check=True)


def test_a_reader_meets_a_whole_gallery_while_it_is_replaced(extractor, crops, tmp_path, monkeypatch):
    out = tmp_path / "gallery"
    Gallery.build(out, extractor, [open_source(str(crops / "cam 0"))], None, quiet)
    loaded, calls = Columns.load, []

    def replaced_meanwhile(folder: Path, images: int) -> Columns:
        if not calls:
            calls.append(folder)
            Gallery.load(out).add(extractor, [open_source(str(crops / "cam 1"))], quiet)
        return loaded(folder, images)

    monkeypatch.setattr(Columns, "load", replaced_meanwhile)
    assert len(Gallery.load(out)) == 12


def test_two_writers_do_not_meet(extractor, crops, tmp_path):
    out = tmp_path / "gallery"
    gallery = Gallery.build(out, extractor, [open_source(str(crops / "cam 0"))], None, quiet)
    program = (
        f"from pathlib import Path\nfrom finetune.gallery_files import writing\nwith writing(Path({str(out)!r})): pass"
    )
    with writing(out):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=small.environment())
        assert "another process is changing the gallery" in done.stderr
    Gallery.load(out).add(extractor, [open_source(str(crops / "cam 1"))], quiet)
    with pytest.raises(UserError, match="was changed meanwhile"):
        gallery.remove(np.ones(6, bool))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda folder: (folder / "index.faiss").write_bytes(b"half"), "cannot be read as an index"),
        (lambda folder: (folder / "keys.npy").unlink(), "lacks keys.npy"),
        (lambda folder: np.save(folder / "pids.npy", np.zeros(3, np.int64)), "do not hold the 12 images"),
        (lambda folder: os.truncate(folder / "vectors.f32", 100), "does not hold 12 vectors of 32"),
        (lambda folder: (folder.parent / "gallery.json").unlink(), "has no gallery.json"),
    ],
)
def test_a_damaged_gallery_is_told(extractor, crops, tmp_path, spoil, told):
    Gallery.build(tmp_path / "gallery", extractor, [open_source(str(crops))], "SQ8", quiet)
    spoil(generation(tmp_path / "gallery", 1))
    with pytest.raises(UserError, match=told):
        Gallery.load(tmp_path / "gallery")


def test_what_stands_in_the_way_is_left_alone(extractor, crops, tmp_path):
    sources = [open_source(str(crops))]
    Gallery.build(tmp_path / "gallery", extractor, sources, None, quiet)
    with pytest.raises(UserError, match="is a gallery already"):
        Gallery.build(tmp_path / "gallery", extractor, sources, None, quiet)
    with pytest.raises(UserError, match="is no gallery; choose another"):
        Gallery.build(crops, extractor, sources, None, quiet)
    (tmp_path / "cut" / "generation-000001").mkdir(parents=True)  # of a build that was killed
    assert len(Gallery.build(tmp_path / "cut", extractor, sources, None, quiet)) == 12
    for path, told in [("nowhere", "does not exist"), (str(tmp_path / "gallery"), "holds no images")]:
        with pytest.raises(UserError, match=told):
            open_source(path)
