"""Views of fine-tuning: pixels against hand-made images, frequencies against the stated probabilities."""

import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from timm.data.random_erasing import RandomErasing

from finetune.augment import Augment, AugmentConfig, erase_rectangle, shifted

PLAIN = {"flip": 0.0, "pad": 0, "erase": 0.0}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def ramp(height: int, width: int) -> Image.Image:
    """Every pixel different from its mirror image and its neighbours."""
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([rows * 255 // height, columns * 255 // width, (rows * 7 + columns * 13) % 256], axis=2)
    return Image.fromarray(pixels.astype(np.uint8))


def bytes_of(view: np.ndarray) -> np.ndarray:
    """Undo mean = std = 0.5: uint8 [H, W, 3]."""
    return np.rint((view.transpose(1, 2, 0) * 0.5 + 0.5) * 255).astype(np.int64)


def test_normalisation_by_hand():
    augment = Augment(AugmentConfig(height=8, width=8, pad=0, mean=(0.5, 0.4, 0.2), std=(0.5, 0.2, 0.1)))
    view = augment.test_view(Image.new("RGB", (8, 8), (255, 0, 51)))
    assert view.shape == (3, 8, 8)
    assert view.dtype == np.float32
    np.testing.assert_allclose(view[:, 3, 5], [1.0, -2.0, 0.0], atol=1e-6)


def test_views_of_the_right_size_are_the_pixels_themselves():
    image = ramp(32, 16)
    augment = Augment(AugmentConfig(height=32, width=16, **PLAIN))
    np.testing.assert_array_equal(bytes_of(augment.test_view(image)), np.asarray(image))
    np.testing.assert_array_equal(bytes_of(augment.train_view(image, rng())), np.asarray(image))


def test_train_resizes_bicubic_and_test_bilinear():
    image = ramp(50, 30)
    augment = Augment(AugmentConfig(height=32, width=16, **PLAIN))
    kernels = {"train": Image.Resampling.BICUBIC, "test": Image.Resampling.BILINEAR}
    expected = {name: np.asarray(image.resize((16, 32), kernel)) for name, kernel in kernels.items()}
    assert (expected["train"] != expected["test"]).any()
    np.testing.assert_array_equal(bytes_of(augment.train_view(image, rng())), expected["train"])
    np.testing.assert_array_equal(bytes_of(augment.test_view(image)), expected["test"])


def test_certain_flip_mirrors():
    image = ramp(32, 16)
    augment = Augment(AugmentConfig(height=32, width=16, flip=1.0, pad=0, erase=0.0))
    np.testing.assert_array_equal(bytes_of(augment.train_view(image, rng())), np.asarray(image)[:, ::-1])


@pytest.mark.parametrize("down, right", [(0, 0), (3, -2), (-3, 2), (-10, -10), (10, 10)])
def test_shift_is_pad_and_crop(down, right):
    pixels = np.asarray(ramp(20, 12))
    padded = np.pad(pixels, ((10, 10), (10, 10), (0, 0)))
    expected = padded[10 - down : 30 - down, 10 - right : 22 - right]
    np.testing.assert_array_equal(shifted(pixels, down, right), expected)


def test_crop_offsets_are_uniform_and_the_border_is_black():
    # a white image: the black border tells the shift
    augment = Augment(AugmentConfig(height=16, width=12, flip=0.0, pad=2, erase=0.0))
    image, counts = Image.new("RGB", (12, 16), "white"), np.zeros((5, 5))
    draws, generator = 2500, rng(1)
    for _ in range(draws):
        view = augment.train_view(image, generator)[0]
        assert set(np.unique(view)) <= {-1.0, 1.0}
        rows, columns = np.flatnonzero((view == 1).any(axis=1)), np.flatnonzero((view == 1).any(axis=0))
        down = rows[0] if rows[0] else rows[-1] - 15
        right = columns[0] if columns[0] else columns[-1] - 11
        counts[down + 2, right + 2] += 1
    # 100 expected in each of 25 cells, deviation 9.8; 5 deviations
    assert abs(counts - draws / 25).max() < 49


def test_flip_and_erase_have_their_probabilities():
    image = ramp(32, 16)
    augment = Augment(AugmentConfig(height=32, width=16, flip=0.3, pad=0, erase=0.6))
    plain = Augment(AugmentConfig(height=32, width=16, **PLAIN)).train_view(image, rng())
    generator, draws, flips, erased = rng(2), 2000, 0, 0
    for _ in range(draws):
        view = augment.train_view(image, generator)
        same, mirrored = (view == plain).mean(), (view == plain[:, :, ::-1]).mean()
        flips += mirrored > same
        erased += max(same, mirrored) < 1
    # deviations: sqrt(2000 * .3 * .7) = 20 and sqrt(2000 * .6 * .4) = 22; 5 of them
    assert abs(flips - 600) < 102
    assert abs(erased - 1200) < 110


def test_erased_rectangle_is_unit_noise_in_place():
    augment = Augment(AugmentConfig(height=64, width=32, flip=0.0, pad=0, erase=1.0))
    image, generator, noise = Image.new("RGB", (32, 64), (128, 128, 128)), rng(3), []
    level = np.float32(128 / 255 * 2 - 1)
    for _ in range(60):
        view = augment.train_view(image, generator)
        hole = (abs(view - level) > 1e-5).any(axis=0)
        rows, columns = np.flatnonzero(hole.any(axis=1)), np.flatnonzero(hole.any(axis=0))
        box = view[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert hole.sum() == box[0].size  # one full rectangle
        assert 0.01 < hole.mean() < 0.36
        noise.append(box.ravel())
    values = np.concatenate(noise)
    # over 50,000 normal numbers: mean within 5 / sqrt(n), deviation within 5 / sqrt(2 n)
    assert len(values) > 50_000
    assert abs(values.mean()) < 0.025
    assert abs(values.std() - 1) < 0.02


def test_rectangles_have_the_stated_area_and_aspect():
    generator, areas, ratios = rng(4), [], []
    for _ in range(4000):
        rows, columns = erase_rectangle(4000, 4000, (0.02, 1 / 3), (0.3, 1 / 0.3), generator)
        assert 0 <= rows.start < rows.stop <= 4000
        assert 0 <= columns.start < columns.stop <= 4000
        height, width = rows.stop - rows.start, columns.stop - columns.start
        areas.append(height * width / 4000**2)
        ratios.append(np.log(height / width))
    assert min(areas) > 0.0199
    assert max(areas) < 0.3335
    assert max(np.abs(ratios)) < np.log(1 / 0.3) + 0.01
    # on a square this large few draws fail: area uniform, log aspect uniform around 0 (deviation 0.7 / sqrt(4000))
    assert np.mean(areas) == pytest.approx((0.02 + 1 / 3) / 2, abs=0.012)
    assert abs(np.mean(ratios)) < 0.06


def sizes_by_timm(size: tuple[int, int], draws: int) -> np.ndarray:
    """Top, left, height and width of the rectangles that timm's RandomErasing erases, [draws, 4]."""
    erasing, found = RandomErasing(probability=1.0, mode="const", device="cpu"), []
    state = random.getstate()
    random.seed(0)  # timm draws from Python's global generator
    for _ in range(draws):
        hole = (erasing(torch.ones(1, *size))[0] == 0).numpy()
        rows, columns = np.flatnonzero(hole.any(axis=1)), np.flatnonzero(hole.any(axis=0))
        found.append([rows[0], columns[0], len(rows), len(columns)] if len(rows) else [0, 0, 0, 0])
    random.setstate(state)
    return np.array(found)


@pytest.mark.parametrize("size", [(256, 128), (384, 128)])
def test_rectangles_are_distributed_as_timms(size):
    config, generator, draws = AugmentConfig(), rng(5), 1500
    theirs, ours = sizes_by_timm(size, draws), np.zeros((draws, 4))
    for place in range(draws):
        found = erase_rectangle(*size, config.erase_area, config.erase_aspect, generator)
        if found:
            rows, columns = found
            ours[place] = rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start
    # Kolmogorov and Smirnov's statistic of two samples; above the limit with a probability of 1e-6
    limit = np.sqrt(-np.log(1e-6 / 2) / 2) * np.sqrt(2 / draws)
    for which, (one, two) in enumerate(zip(ours.T, theirs.T, strict=True)):
        values = np.union1d(one, two)
        shares = [np.searchsorted(np.sort(each), values, side="right") / draws for each in (one, two)]
        assert abs(shares[0] - shares[1]).max() < limit, ("top", "left", "height", "width")[which]


def test_a_taller_input_is_taller():
    augment = Augment(AugmentConfig(height=384, width=128))
    image = ramp(90, 40)
    assert augment.train_view(image, rng()).shape == augment.test_view(image).shape == (3, 384, 128)


def test_the_defaults_are_the_published_ones():
    config = AugmentConfig()
    assert (config.height, config.width, config.flip, config.pad, config.erase) == (256, 128, 0.5, 10, 0.5)
    assert config.erase_area == (0.02, 1 / 3)
    assert config.erase_aspect == pytest.approx((0.3, 1 / 0.3))
    assert config.mean == config.std == (0.5, 0.5, 0.5)


def test_no_rectangle_when_none_fits():
    assert erase_rectangle(64, 32, (1.0, 1.0), (1.0, 1.0), rng()) is None


def test_a_view_is_a_function_of_its_generator():
    augment, image = Augment(AugmentConfig()), ramp(90, 40)
    first = augment.train_view(image, rng(7))
    assert first.shape == (3, 256, 128)
    assert first.flags.c_contiguous
    copy = pickle.loads(pickle.dumps(augment))
    np.testing.assert_array_equal(first, copy.train_view(image, rng(7)))
    assert (first != augment.train_view(image, rng(8))).any()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_other_modes_become_rgb(mode):
    image = Image.new("RGB", (20, 40), (255, 255, 255)).convert(mode)
    augment = Augment(AugmentConfig(height=16, width=8, **PLAIN))
    np.testing.assert_allclose(augment.test_view(image), np.ones((3, 16, 8)), atol=1e-6)
    np.testing.assert_allclose(augment.train_view(image, rng()), np.ones((3, 16, 8)), atol=1e-6)


@pytest.mark.parametrize(
    "bad", [{"erase_area": (0.5, 0.1)}, {"erase_aspect": (0.0, 1.0)}, {"std": (0.5, 0.0, 0.5)}, {"flip": 1.1}]
)
def test_ranges(bad):
    with pytest.raises(ValidationError):
        AugmentConfig(**bad)
