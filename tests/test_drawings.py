"""The pictures: what is where, and what a tile shows."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from pretrain import drawings, grids
from pretrain.drawings import Line, Pair
from pretrain.token_clusters import Cluster

GREY_BOX = np.full((16, 8, 3), 90, np.uint8)


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


def count(image: Image.Image, colour: tuple[int, int, int], slack: int = 12) -> int:
    """Pixels of about that colour."""
    return int((np.abs(array(image) - colour) <= slack).all(-1).sum())


def test_a_heat_map_is_dark_at_nothing_and_bright_at_the_most():
    values = np.zeros((4, 2))
    values[1, 0], values[2, 1] = 3, 6
    heat = grids.heated(GREY_BOX, values).astype(int)
    assert heat.shape == GREY_BOX.shape
    tone = heat.sum(-1).reshape(4, 4, 2, 4).mean((1, 3))  # a patch is 4 x 4 pixels
    assert np.unravel_index(tone.argmax(), (4, 2)) == (2, 1)
    assert tone[1, 0] > tone[0, 0] + 100
    assert len(np.unique(tone.round(6))) == 3, "hard edges: a patch is one colour"
    nothing = grids.heated(GREY_BOX, np.zeros((4, 2)))
    assert (nothing == nothing[0, 0]).all()


def test_what_is_kept_keeps_its_colours():
    image = np.zeros((16, 8, 3), np.uint8)
    image[..., 0] = 200
    chosen = np.zeros((4, 2), bool)
    chosen[3, 1] = True
    shown = grids.kept(image, chosen)
    assert (shown[12:, 4:] == (200, 0, 0)).all()
    rest = shown[:12]
    assert (rest == rest[..., :1]).all(), "gray"
    assert rest.min() > 178, "and pale"


@pytest.mark.parametrize("width", [40, 90, 300])
def test_text_is_wrapped_at_words(width):
    font = grids.ImageFont.load_default(grids.FONT)
    text = "black none, yellow the most in that tile; extraordinarily"
    lines = grids.wrapped(text, font, width)
    assert " ".join(lines) == text
    assert all(font.getlength(line) <= width or " " not in line for line in lines)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    image, path = Image.new("RGB", (5, 7)), tmp_path / "deep" / "a.png"
    grids.write_file(path, grids.encoded(image))
    assert Image.open(path).size == (5, 7)
    before = path.read_bytes()

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="No space left") as told:
        grids.write_file(path, b"other")
    assert told.value.filename == str(path)
    assert [each.read_bytes() for each in path.parent.iterdir()] == [before]


def test_attention_has_a_column_a_head_and_two_images_beside_each_other():
    images = np.stack([GREY_BOX] * 3)
    maps = np.ones((3, 5, 4, 2))
    chosen = np.ones((3, 4, 2), bool)
    tile = drawings.tile_of((16, 8))
    assert tile == (96, 192)
    few = drawings.attention_picture(images, maps, chosen, [4], 0.6)
    many = drawings.attention_picture(images, maps, chosen, range(5), 0.6)
    assert few.width == 3 * (4 * (96 + 8) + 16) - 8, "three blocks of four columns"
    assert many.width == 8 * (96 + 8) + 8, "one block of eight"
    assert many.height > 3 * 192 > few.height > 192


def test_components_are_seen_alone_and_together():
    colours = np.zeros((1, 4, 2, 3), np.uint8)
    colours[0, 0, 0] = (255, 40, 90)
    image = drawings.components_picture(GREY_BOX[None], colours, [0.5, 0.3, 0.1])
    patch = 48 * 48
    for colour in ((255, 40, 90), (40, 40, 40), (90, 90, 90)):
        assert count(image, colour, 0) >= patch


def pair(judged: bool) -> Pair:
    lines = [Line(0, 7, True), Line(2, 1, False), Line(4, 4, None)]
    image = np.full((16, 8, 3), 255, np.uint8)
    if not judged:
        lines = [line._replace(right=None) for line in lines]
    return Pair(image, image, lines, ["a caption"], judged)


def line_picture(right: bool | None, judged: bool = True) -> tuple[np.ndarray, int, int, int]:
    """One horizontal line from the last patch of the first row to the first of the second image: the picture, its row,
    where it begins and ends."""
    image = np.full((16, 8, 3), 255, np.uint8)
    drawn = drawings.pairs_picture([Pair(image, image, [Line(1, 0, right)], [], judged)], (4, 2), "")
    width, height = drawings.tile_of((16, 8), drawings.TALL + 64)
    row = drawn.height - height - grids.GAP - 2 * grids.LINE + height // 8
    begin = grids.GAP + 3 * width // 4
    return array(drawn), row, begin, begin + width // 2 + drawings.BETWEEN


@pytest.mark.parametrize("right, colour", [(True, drawings.GREEN), (False, drawings.RED), (None, grids.GREY)])
def test_judged_lines_tell_right_from_wrong_by_colour_and_form(right, colour):
    picture, row, begin, end = line_picture(right)
    of_colour = (np.abs(picture - colour) <= 30).all(-1)
    rows, columns = np.nonzero(of_colour)
    assert np.median(rows) == pytest.approx(row, abs=2)
    assert columns.min() == pytest.approx(begin, abs=4)
    assert columns.max() == pytest.approx(end, abs=7)
    share = of_colour[row - 1 : row + 1, begin + 8 : end - 8].any(0).mean()
    assert share > 0.98 if right else 0.3 < share < 0.8, "only what is right is a whole line"
    crossed = of_colour[row - 6 : row - 4, end - 6 : end - 3].any()
    assert crossed == (right is False), "and what is wrong is crossed out"


def test_lines_without_a_truth_are_told_apart_by_colour():
    picture, row, begin, end = line_picture(None, judged=False)
    of_colour = (np.abs(picture - drawings.PALETTE[0]) <= 30).all(-1)
    assert of_colour[row - 1 : row + 1, begin + 8 : end - 8].any(0).mean() > 0.98, "a whole line"
    free = drawings.pairs_picture([pair(False)], (4, 2), "text")
    assert all(count(free, colour, 30) > 100 for colour in drawings.PALETTE[:3])
    assert count(free, drawings.RED, 8) == 0


def test_pairs_stand_four_in_a_line():
    sizes = [drawings.pairs_picture([pair(True)] * many, (4, 2), "text").size for many in (2, 4, 5)]
    assert sizes[1][0] > 1.9 * sizes[0][0]
    assert sizes[2][0] == sizes[1][0]
    assert sizes[2][1] > 1.8 * sizes[1][1]


def test_a_window_has_its_patch_in_the_middle():
    image = np.zeros((16, 8, 3), np.uint8)
    image[4:8, 4:] = (0, 0, 200)  # row 1, column 1 of 4 x 2
    cut = drawings.window(image, 3, 4, 50)
    assert cut.shape == (50, 50, 3)
    middle = cut[23:27, 23:27].astype(int).reshape(-1, 3)
    assert np.abs(middle - (63, 15, 165)).max() <= 16, "a quarter of the tint; the enlargement is smooth"
    assert (cut[20, 20:30] == (255, 60, 0)).all(), "a frame"
    for outside in (cut[:4], cut[:, :4], cut[:, 36:]):  # above, left and right of the image, its soft edge aside
        assert (outside == grids.EMPTY).all()
    assert cut[36:48, 15:18].max() == 0, "the image below it"


def test_mosaics_say_what_they_hold_and_leave_places_empty():
    found = [Cluster(7, 1234, 30, []), Cluster(9, 2, 2, [])]
    windows = [[np.full((10, 10, 3), (0, 99, 0), np.uint8)] * many for many in (36, 2)]
    image = drawings.clusters_picture(found, windows, 10, "text")
    assert count(image, (0, 99, 0), 0) == 38 * 100
    assert count(image, grids.EMPTY, 0) >= 34 * 100


def test_a_picture_is_the_same_each_time():
    made = [grids.encoded(drawings.pairs_picture([pair(True)], (4, 2), "text")) for _ in range(2)]
    assert made[0] == made[1]
    assert Image.open(io.BytesIO(made[0])).format == "PNG"
