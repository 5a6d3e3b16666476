"""Each photometric operation against torchvision or a plain computation, on colours that no operation clips."""

import colorsys
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image, ImageOps

from pretrain import photometric
from pretrain.photometric import (
    BRIGHTNESS,
    CONTRAST,
    GRAY,
    HUE,
    NUMBERS,
    SATURATION,
    SIGMA,
    SOLARIZE,
    TO_GRAY,
    PhotometricConfig,
    blur,
    draw,
)
from shards.seeds import generator

PLAIN = PhotometricConfig(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
TOLERANCE = 3e-4  # torchvision's luma has 0.2989 for red, ours 0.299


def numbers(count: int = 1, **given: float) -> torch.Tensor:
    """Photometric numbers that change nothing but what is given by the (lower-case) name of its place."""
    rows = torch.tensor([[1, 1, 1, 0, 0, 0, 0]] * count, dtype=torch.float32)
    for name, value in given.items():
        rows[:, getattr(photometric, name.upper())] = value
    return rows


@pytest.fixture
def crops():
    """uint8 [3, 20, 12, 3] between 90 and 165: twenty per cent more or less of anything stays inside 0..255."""
    return torch.from_numpy(np.random.default_rng(0).integers(90, 166, (3, 20, 12, 3), dtype=np.uint8))


def floats(crops: torch.Tensor) -> torch.Tensor:
    return crops.permute(0, 3, 1, 2).float() / 255


def apply(crops: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return photometric.apply(crops, rows, PLAIN)


def test_without_any_operation_pixels_stay(crops):
    assert torch.allclose(apply(crops, numbers(3)), floats(crops), atol=1e-6)


@pytest.mark.parametrize(
    "name, function, factors",
    [
        ("brightness", TF.adjust_brightness, (0.6, 1.0, 1.4)),
        ("contrast", TF.adjust_contrast, (0.6, 1.0, 1.4)),
        ("saturation", TF.adjust_saturation, (0.8, 1.0, 1.2)),
    ],
)
def test_a_single_operation_is_that_of_torchvision(crops, name, function, factors):
    rows = numbers(3)
    rows[:, getattr(photometric, name.upper())] = torch.tensor(factors)
    expected = torch.stack([function(image, factor) for image, factor in zip(floats(crops), factors, strict=True)])
    assert 0 < expected.min() <= expected.max() < 1, "nothing is clipped"
    assert (expected[0] - floats(crops)[0]).abs().max() > 0.01
    assert torch.allclose(apply(crops, rows), expected, atol=TOLERANCE)


def test_grayscale(crops):
    found = apply(crops, numbers(3, to_gray=1))
    assert torch.allclose(found, TF.rgb_to_grayscale(floats(crops), 3), atol=TOLERANCE)
    assert torch.equal(found[:, 0], found[:, 1])


def test_operations_are_clipped_at_the_end():
    crops = torch.tensor([[[[250, 128, 3]]]], dtype=torch.uint8)
    bright = apply(crops, numbers(brightness=1.4)).flatten()
    assert torch.allclose(bright, torch.tensor([1.0, 1.4 * 128 / 255, 1.4 * 3 / 255]), atol=1e-6)


@pytest.mark.parametrize("turn", range(24))
def test_all_operations_together_are_those_of_torchvision_in_any_order(crops, turn):
    factors = {BRIGHTNESS: 0.8, CONTRAST: 1.3, SATURATION: 0.7, HUE: 0.0}
    functions = {
        BRIGHTNESS: TF.adjust_brightness,
        CONTRAST: TF.adjust_contrast,
        SATURATION: TF.adjust_saturation,
        HUE: lambda image, _: image,
    }
    expected = floats(crops)
    for operation in list(itertools.permutations(range(4)))[turn]:
        # one by one: contrast pulls each image towards its own mean
        expected = torch.stack([functions[operation](image, factors[operation]) for image in expected])
    found = apply(crops, numbers(3, brightness=0.8, contrast=1.3, saturation=0.7))
    assert torch.allclose(found, expected, atol=TOLERANCE)
    gray = apply(crops, numbers(3, brightness=0.8, contrast=1.3, saturation=0.7, to_gray=1))
    assert torch.allclose(gray, TF.rgb_to_grayscale(expected, 3), atol=TOLERANCE)


def test_every_crop_has_its_own_factors(crops):
    rows = torch.cat([numbers(brightness=0.7), numbers(contrast=0.5, hue=0.1), numbers(to_gray=1)])
    together = apply(crops, rows)
    for place in range(3):
        alone = apply(crops[place : place + 1], rows[place : place + 1])
        assert torch.allclose(together[place], alone[0], atol=1e-6)


def luma(images: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bchw,c->bhw", images, torch.tensor(GRAY))


@pytest.mark.parametrize("turns", [0.0, 1.0, -1.0])
def test_hue_of_no_turn_and_of_a_full_turn_changes_nothing(crops, turns):
    assert torch.allclose(apply(crops, numbers(3, hue=turns)), floats(crops), atol=1e-5)


@pytest.mark.parametrize("turns", [0.1, -0.1, 0.03])
def test_hue_keeps_luma_and_grays(crops, turns):
    found = apply(crops, numbers(3, hue=turns))
    assert (found - floats(crops)).abs().max() > 0.01
    assert torch.allclose(luma(found), luma(floats(crops)), atol=1e-5)
    gray = torch.full((1, 2, 2, 3), 77, dtype=torch.uint8)
    assert torch.allclose(apply(gray, numbers(hue=turns)), floats(gray), atol=1e-5)


def hsv_hue(images: torch.Tensor) -> np.ndarray:
    """Hue of each pixel in full turns."""
    pixels = images.permute(0, 2, 3, 1).reshape(-1, 3).tolist()
    return np.array([colorsys.rgb_to_hsv(*pixel)[0] for pixel in pixels])


@pytest.mark.parametrize("turns", [0.1, -0.1, 0.03])
def test_hue_turns_the_same_way_and_about_as_far_as_in_hsv(turns):
    # colours of all hues; a turn in YIQ moves the hue of HSV here more and there less
    hues = np.linspace(0, 1, 120, endpoint=False)
    colours = np.array([colorsys.hsv_to_rgb(hue, 0.4, 0.6) for hue in hues]) * 255
    crops = torch.from_numpy(colours.round().astype(np.uint8)).view(1, 10, 12, 3)
    moved = hsv_hue(apply(crops, numbers(hue=turns))) - hsv_hue(floats(crops))
    moved = (moved + 0.5) % 1 - 0.5
    assert (np.sign(moved) == np.sign(turns)).all()
    assert moved.mean() == pytest.approx(turns, rel=0.1)
    assert np.abs(moved).max() < 2 * abs(turns)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.0])
def test_blur_is_a_gaussian_convolution(sigma):
    images = torch.rand(2, 3, 48, 40, generator=torch.Generator().manual_seed(0))
    radius = 12  # six standard deviations of the widest
    at = torch.arange(-radius, radius + 1).double()
    weights = torch.exp(-(at[:, None] ** 2 + at[None] ** 2) / (2 * sigma**2))
    kernel = (weights / weights.sum()).expand(3, 1, -1, -1)
    expected = F.conv2d(images.double(), kernel, groups=3)
    found = blur(images, torch.full((2,), sigma))[..., radius:-radius, radius:-radius]
    assert torch.allclose(found.double(), expected, atol=1e-5)


def test_blur_keeps_a_flat_image_and_leaves_sigma_0_alone():
    flat = torch.full((1, 3, 9, 7), 0.4)
    assert torch.allclose(blur(flat, torch.tensor([2.0])), flat, atol=1e-6)
    images = torch.rand(2, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    found = blur(images, torch.tensor([0.0, 2.0]))
    assert torch.equal(found[0], images[0])
    assert not torch.allclose(found[1], images[1], atol=0.05)


def test_only_the_chosen_crops_are_blurred(crops):
    rows = numbers(3)
    rows[1, SIGMA] = 1.5
    found, original = apply(crops, rows), floats(crops)
    assert torch.allclose(found[[0, 2]], original[[0, 2]], atol=1e-6)
    assert torch.allclose(found[1:2], blur(original[1:2], torch.tensor([1.5])), atol=1e-5)


def test_solarise_inverts_from_128_on():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    crop = np.stack([levels, levels.T, levels[::-1]], axis=-1)
    crops = torch.from_numpy(np.stack([crop, crop]))
    rows = numbers(2)
    rows[1, SOLARIZE] = 1
    expected = np.asarray(ImageOps.solarize(Image.fromarray(crop), threshold=128))
    found = (apply(crops, rows) * 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(found[0] - crop).max() < 1e-3
    assert np.abs(found[1] - expected).max() < 1e-3


def test_colour_comes_before_blur_before_solarise(crops):
    rows = numbers(3, brightness=1.2, sigma=1.0, solarize=1)
    blurred = blur(TF.adjust_brightness(floats(crops), 1.2), torch.ones(3))
    expected = torch.where(blurred >= 128 / 255, 1 - blurred, blurred)
    assert torch.allclose(apply(crops, rows), expected, atol=1e-5)


def test_normalised_by_channel(crops):
    config = PhotometricConfig()
    expected = torch.stack([TF.normalize(image, config.mean, config.std) for image in floats(crops)])
    assert torch.allclose(photometric.apply(crops, numbers(3), config), expected, atol=1e-5)


def test_the_same_numbers_give_the_same_bits(crops):
    rows = torch.stack([torch.from_numpy(draw(generator(0, "p", n), 0, PhotometricConfig())) for n in range(3)])
    before = crops.clone()
    assert torch.equal(apply(crops, rows), apply(crops, rows.clone()))
    assert torch.equal(crops, before)


@pytest.fixture(scope="module")
def drawn():
    """4000 draws of each kind of crop, float32 [3, 4000, 8]."""
    config = PhotometricConfig()
    return np.stack([[draw(generator(0, "p", kind, n), kind, config) for n in range(4000)] for kind in range(3)])


def test_chances_of_each_operation(drawn):
    # standard deviation of a share of 4000 is 0.008 at most
    assert drawn.dtype == np.float32
    assert drawn.shape[-1] == NUMBERS
    assert np.allclose((drawn[..., BRIGHTNESS] != 1).mean(1), 0.8, atol=0.03)
    assert np.allclose(drawn[..., TO_GRAY].mean(1), 0.2, atol=0.03)
    assert np.allclose((drawn[..., SIGMA] > 0).mean(1), [1.0, 0.1, 0.5], atol=0.03)
    assert np.allclose(drawn[..., SOLARIZE].mean(1), [0.0, 0.2, 0.0], atol=0.03)
    assert (drawn[0, :, SIGMA] > 0).all()
    assert not drawn[[0, 2], :, SOLARIZE].any()


@pytest.mark.parametrize(
    "place, low, high", [(BRIGHTNESS, 0.6, 1.4), (CONTRAST, 0.6, 1.4), (SATURATION, 0.8, 1.2), (HUE, -0.1, 0.1)]
)
def test_jitter_is_uniform_in_its_range(drawn, place, low, high):
    on = drawn[0][drawn[0, :, BRIGHTNESS] != 1][:, place]
    shares, _ = np.histogram(on, bins=5, range=(low - 1e-6, high + 1e-6))
    assert shares.sum() == len(on)
    assert np.allclose(shares / len(on), 0.2, atol=0.03)


def test_blur_width_is_uniform(drawn):
    sigma = drawn[0, :, SIGMA]
    assert 0.1 <= sigma.min() < 0.12
    assert 1.98 < sigma.max() <= 2.0
    assert sigma.mean() == pytest.approx(1.05, abs=0.04)


def test_what_is_drawn_for_one_operation_does_not_hang_on_another():
    other = PhotometricConfig(brightness=0.1, blur=(1.0, 0.0, 0.0), gray=0.0)
    for n in range(50):
        one, two = draw(generator(0, "p", n), 0, PhotometricConfig()), draw(generator(0, "p", n), 0, other)
        kept = [CONTRAST, SATURATION, HUE, SIGMA, SOLARIZE]
        assert np.array_equal(one[kept], two[kept])


def test_switched_off_it_changes_nothing(crops):
    off = PhotometricConfig(jitter=0, gray=0, blur=(0, 0, 0), solarize=(0, 0, 0), mean=(0, 0, 0), std=(1, 1, 1))
    rows = torch.stack([torch.from_numpy(draw(generator(0, "p", n), 1, off)) for n in range(3)])
    assert torch.equal(rows, numbers(3))
    assert torch.allclose(photometric.apply(crops, rows, off), floats(crops), atol=1e-6)
