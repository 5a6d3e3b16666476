"""What the search page takes from a visitor, and the HTML that it gives: pictures, names, numbers, attention."""

import io
import struct
import zlib
from types import SimpleNamespace

import app_served
import numpy as np
import pytest
import torch
from PIL import Image

from finetune import app_attention, app_uploads, app_views
from finetune.app_search import Query, Searcher, Settings
from finetune.backbones import BackboneConfig, TimmBackbone, arguments_of
from pretrain.attention import cls_attention
from recipes.errors import UserError
from shards.schema import UNKNOWN


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Searcher:
    return app_served.people(tmp_path_factory.mktemp("people"), tmp_path_factory.getbasetemp())


def encoded(kind: str = "PNG", size: tuple[int, int] = (20, 60), **how) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(buffer, kind, **how)
    return buffer.getvalue()


def png(width: int, height: int) -> bytes:
    """A file of 70 bytes that says that it has so many pixels."""
    chunks = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b""), b"IEND"
    parts = [struct.pack(">I", len(each) - 4) + each + struct.pack(">I", zlib.crc32(each)) for each in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    "data, sentence",
    [
        (png(60_000, 60_000), "has far more pixels than the limit"),
        (png(5001, 5000), "more than the limit of 25,000,000"),
        (encoded("JPEG", (400, 800))[:-400], "is a damaged or truncated JPEG"),
        (encoded("GIF"), "is not a JPEG, PNG, WebP or BMP image"),
        (encoded("TIFF"), "is not a JPEG, PNG, WebP or BMP image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not a JPEG, PNG, WebP or BMP image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not a JPEG, PNG, WebP or BMP image"),
        (b"", "is empty"),
    ],
)
def test_a_bad_picture_is_a_sentence(data, sentence):
    with pytest.raises(UserError) as error:
        app_uploads.opened("x.jpg", data)
    told = str(error.value)
    assert told.startswith("x.jpg ")
    assert sentence in told
    assert "images.on_bad" not in told, "advice for those who pack sets"


def test_what_makes_a_picture_a_poor_query_is_told():
    turned = Image.Exif()
    turned[0x0112] = 6
    assert app_uploads.opened("a", encoded("JPEG", exif=turned)).notes[0].startswith("The file says that it is to be")
    assert "wider than high" in app_uploads.opened("a", encoded(size=(60, 20))).notes[0]
    assert app_uploads.opened("a", encoded()).notes == ()
    assert app_uploads.shown_name("C:\\fakepath\\me \n you.jpg") == "me you.jpg"
    assert app_uploads.shown_name("/") == app_uploads.shown_name(None) == "your image"
    assert len(app_uploads.shown_name("a" * 500 + ".jpg")) == 80


# ---- attention and HTML


def test_attention_is_the_mean_over_the_heads(people):
    extractor = people.extractor
    noise = np.random.default_rng(0).integers(0, 256, (60, 30, 3), dtype=np.uint8)
    pictures = [np.asarray(Image.open(io.BytesIO(encoded()))), noise]
    views = torch.from_numpy(np.stack([extractor.augment.test_view(Image.fromarray(each)) for each in pictures]))
    expected = cls_attention(extractor.model.backbone, views).mean(1)
    found = app_attention.maps(extractor, pictures, [UNKNOWN, 0])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert app_attention.over(pictures[0], found[0]).shape == (60, 20, 3)
    hit = people.search(people.member(0), Settings(top=1, attention=True)).hits[0]
    np.testing.assert_allclose(hit.attention, app_attention.one(extractor, hit.pixels, hit.answer.camid), atol=1e-6)


def test_attention_needs_a_vision_transformer():
    backbone = TimmBackbone(arguments_of(BackboneConfig(name="resnet18"), (64, 32)), 0.0)
    told = app_attention.obstacle(SimpleNamespace(model=SimpleNamespace(backbone=backbone)))
    assert told == "Attention is shown for Vision Transformers; this model is resnet18, which has no CLS token."


def test_names_are_text(people):
    hostile = "${alert(1)} {{value}} `x` <script>alert(2)</script> \" onload='x'"
    query = Query(hostile, people.member(0).feature)
    result = people.search(query, Settings())
    hits = [hit._replace(label=hostile) for hit in result.hits]
    html = app_views.found(people, query, Settings(), result._replace(hits=hits), 1, False)
    for bad in ("${", "{{", "`", "<script", "onload='"):
        assert bad not in html, bad
    assert html.count("&lt;script&gt;") >= 13


def test_a_spreadsheet_does_not_compute_names(people):
    hits = people.search(people.member(0), Settings(top=2)).hits
    rows = app_views.exported([hits[0]._replace(label="=cmd|'x'!A1"), hits[1]._replace(label="ok.jpg")])
    lines = app_views.as_csv(rows).splitlines()
    assert lines[0] == "place,id,score,distance,same,probability,image,camera,identity"
    assert lines[1].split(",")[6] == "'=cmd|'x'!A1"
    assert lines[2].split(",")[6] == "ok.jpg"
    assert rows[0]["image"] == "=cmd|'x'!A1", "JSON has the name as it is"


def test_numbers_for_people():
    assert app_views.cosine(0.91234, [0.91234, 0.5]) == "0.912"
    assert app_views.cosine(0.998765, [0.998765, 0.9981]) == "0.99877"
    assert [app_views.percent(p) for p in (0.001, 0.5, 0.996)] == ["under 1%", "50%", "over 99%"]
    assert [app_uploads.size_told(n) for n in (300_000, 10_000_000)] == ["300 kB", "10 MB"]
