"""Each photometric operation against torchvision on Pillow images, by hand, and the numbers that are drawn."""

import colorsys

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageFilter, ImageOps

from pretrain import photometric, views_pil
from pretrain.photometric import NUMBERS, ORDERS, Changes, PhotometricConfig, blur, blur_kernel, draw, mix
from shards.seeds import generator

NOTHING = Changes((), 1.0, 1.0, 1.0, 0.0, False, 0.0, False)
ORDER = ORDERS[0]


def numbers(n: int) -> list[float]:
    return generator(0, "test/photometric", n).random(NUMBERS).tolist()


@pytest.fixture(scope="module")
def crop():
    """uint8 [40, 24, 3] between 90 and 165: twenty per cent more or less of anything stays inside 0..255."""
    return np.random.default_rng(0).integers(90, 166, (40, 24, 3), dtype=np.uint8)


def apart(one: np.ndarray, other: np.ndarray) -> int:
    """The largest difference."""
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other)).max())


def test_without_any_change_pixels_stay(crop):
    for order in ((), *ORDERS):
        assert apart(photometric.apply(crop, NOTHING._replace(order=order)), crop) == 0
    assert apart(views_pil.apply(crop, NOTHING._replace(order=ORDER)), crop) == 0


@pytest.mark.parametrize(
    "name, function, factors",
    [
        ("brightness", TF.adjust_brightness, (0.6, 0.9, 1.4)),
        ("contrast", TF.adjust_contrast, (0.6, 0.9, 1.4)),
        ("saturation", TF.adjust_saturation, (0.8, 1.1, 1.2)),
    ],
)
def test_a_single_operation_is_that_of_torchvision(crop, name, function, factors):
    for factor in factors:
        expected = function(Image.fromarray(crop), factor)
        changes = NOTHING._replace(order=ORDER, **{name: factor})
        found = photometric.apply(crop, changes)
        assert apart(expected, crop) > 2
        assert apart(found, expected) <= 1
        assert found.mean() == pytest.approx(np.asarray(expected).mean(), abs=0.2)
        assert apart(views_pil.apply(crop, changes), expected) == 0


def test_values_are_clipped_at_both_ends():
    crop = np.array([[[250, 128, 3], [10, 10, 10]]], np.uint8)
    found = photometric.apply(crop, NOTHING._replace(order=ORDER, brightness=1.4))
    assert found.tolist() == [[[255, 179, 4], [14, 14, 14]]]
    # the mean luma is 0.299 * 130 + 0.587 * 69 + 0.114 * 6.5 = 80.1, rounded to 80; 10 -> 80 - 2 * 70 < 0
    found = photometric.apply(crop, NOTHING._replace(order=ORDER, contrast=2.0))
    assert found.tolist() == [[[255, 176, 0], [0, 0, 0]]]


@pytest.mark.parametrize("order", ORDERS)
def test_all_operations_together_are_those_of_torchvision_in_any_order(crop, order):
    changes = NOTHING._replace(order=order, brightness=0.9, contrast=1.2, saturation=0.8, hue=0.03)
    found, expected = photometric.apply(crop, changes), views_pil.apply(crop, changes)
    by_hand = Image.fromarray(crop)
    for name in order:
        by_hand = getattr(TF, f"adjust_{name}")(by_hand, getattr(changes, name))
    assert apart(expected, by_hand) == 0
    assert apart(found, crop) > 10
    assert np.abs(found.astype(int) - expected).mean() < 3  # the hue is turned by another formula
    assert found.mean() == pytest.approx(expected.mean(), abs=0.5)


def test_contrast_clips_before_or_after_brightness():
    crop = np.array([[[200, 200, 200], [40, 40, 40]]], np.uint8)
    first = NOTHING._replace(order=("brightness", "contrast", "saturation", "hue"), brightness=1.4, contrast=0.6)
    # 280 is cut to 255; mean (255 + 56) / 2 = 155.5, so 156; 0.6 * 255 + 0.4 * 156 = 215.4, 0.6 * 56 + 62.4 = 96
    assert photometric.apply(crop, first).tolist() == [[[215] * 3, [96] * 3]]
    # mean 120; 0.6 * 200 + 48 = 168, 0.6 * 40 + 48 = 72; times 1.4
    last = first._replace(order=("hue", "contrast", "saturation", "brightness"))
    assert photometric.apply(crop, last).tolist() == [[[235] * 3, [100] * 3]]
    for changes in (first, last):
        assert apart(photometric.apply(crop, changes), views_pil.apply(crop, changes)) <= 1


def test_hue_turns_about_the_grays(crop):
    reds = np.array([[[255, 0, 0], [77, 77, 77]]], np.uint8)
    assert mix(reds, 1, 1, 1 / 3).tolist() == [[[0, 255, 0], [77, 77, 77]]]  # a third of a turn: red to green
    assert mix(reds, 1, 1, -1 / 3).tolist() == [[[0, 0, 255], [77, 77, 77]]]
    assert apart(mix(crop, 1, 1, 1.0), crop) <= 1
    sums = [pixels.astype(int).sum(-1) for pixels in (crop, mix(crop, 1, 1, 0.07))]
    assert np.abs(sums[0] - sums[1]).max() <= 2


def hue(pixels: np.ndarray) -> np.ndarray:
    """Hue of each pixel in full turns."""
    return np.array([colorsys.rgb_to_hsv(*pixel)[0] for pixel in pixels.reshape(-1, 3) / 255])


@pytest.mark.parametrize("turn", [0.1, -0.1, 0.03])
def test_hue_turns_the_same_way_and_about_as_far_as_in_hsv(turn):
    colours = np.array([colorsys.hsv_to_rgb(h, 0.4, 0.6) for h in np.linspace(0, 1, 120, endpoint=False)]) * 255
    crop = colours.round().astype(np.uint8).reshape(10, 12, 3)
    moved = (hue(mix(crop, 1, 1, turn)) - hue(crop) + 0.5) % 1 - 0.5
    assert (np.sign(moved) == np.sign(turn)).all()
    assert moved.mean() == pytest.approx(turn, rel=0.1)
    assert np.abs(moved).max() < 1.3 * abs(turn)


def test_grayscale(crop):
    found = photometric.apply(crop, NOTHING._replace(gray=True))
    assert apart(found, TF.rgb_to_grayscale(Image.fromarray(crop), 3)) <= 1
    assert found.shape == crop.shape
    assert (found[..., 0] == found[..., 2]).all()
    changes = NOTHING._replace(gray=True, sigma=1.3, solarize=True)  # on one channel until the end
    expected = photometric.apply(np.repeat(found[..., :1], 3, -1), changes._replace(gray=False))
    assert apart(photometric.apply(crop, changes), expected) == 0


@pytest.mark.parametrize("sigma", [0.4, 0.7, 1.0, 1.5, 2.0])
def test_blur_has_its_width_keeps_the_mean_and_is_pillows(sigma):
    kernel = blur_kernel(sigma).astype(float)
    at = np.arange(len(kernel)) - len(kernel) // 2
    assert kernel.sum() == pytest.approx(1)
    assert np.sqrt((kernel * at**2).sum()) == pytest.approx(sigma, rel=0.03)
    assert np.array_equal(kernel, kernel[::-1])
    noise = np.random.default_rng(0).integers(0, 256, (96, 80, 3), dtype=np.uint8)
    found = blur(noise, sigma)
    expected = np.asarray(Image.fromarray(noise).filter(ImageFilter.GaussianBlur(sigma)))
    inner = slice(16, -16)  # Pillow blurs three times and repeats the border each time
    assert apart(found[inner, inner], expected[inner, inner]) <= 4
    assert np.abs(found.astype(int) - expected).mean() < 1
    assert found.mean() == pytest.approx(noise.mean(), abs=0.7)
    assert (blur(np.full_like(noise, 201), sigma) == 201).all()


def test_blur_is_about_a_gaussian():
    for sigma in (0.7, 1.2, 2.0):
        kernel = blur_kernel(sigma)
        at = np.arange(len(kernel)) - len(kernel) // 2
        gauss = np.exp(-(at**2) / (2 * sigma**2))
        assert np.abs(kernel - gauss / gauss.sum()).max() < 0.06


def test_solarise_inverts_from_128_on():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    crop = np.stack([levels, levels.T, levels[::-1]], axis=-1)
    expected = ImageOps.solarize(Image.fromarray(crop), threshold=128)
    for way in (photometric, views_pil):
        assert apart(way.apply(crop, NOTHING._replace(solarize=True)), expected) == 0


def test_colour_comes_before_blur_before_solarise(crop):
    changes = NOTHING._replace(order=ORDER, brightness=1.2, sigma=1.0, solarize=True)
    bright = photometric.apply(crop, NOTHING._replace(order=ORDER, brightness=1.2))
    assert apart(photometric.apply(crop, changes), ImageOps.solarize(Image.fromarray(blur(bright, 1.0)), 128)) == 0


def test_the_crop_given_stays_as_it_was(crop):
    before = crop.copy()
    for n in range(20):
        photometric.apply(crop, draw(numbers(n), 1, PhotometricConfig()))
    assert np.array_equal(crop, before)


def test_normalised_by_channel():
    config = PhotometricConfig()
    crops = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 20, 12, 3), dtype=np.uint8))
    images = crops.permute(0, 3, 1, 2).float() / 255
    expected = torch.stack([TF.normalize(image, config.mean, config.std) for image in images])
    found = photometric.normalize(crops, config.mean, config.std)
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, atol=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def drawn():
    """4000 draws of each kind of crop."""
    return [[draw(numbers(n), kind, PhotometricConfig()) for n in range(4000)] for kind in range(3)]


def share(flags) -> float:
    return float(np.mean(list(flags)))


def test_chances_of_each_operation(drawn):
    # standard deviation of a share of 4000 is 0.008 at most
    for kind, (blurred, solarised) in enumerate([(1.0, 0.0), (0.1, 0.2), (0.5, 0.0)]):
        changes = drawn[kind]
        assert share(bool(c.order) for c in changes) == pytest.approx(0.8, abs=0.03)
        assert share(c.gray for c in changes) == pytest.approx(0.2, abs=0.03)
        assert share(c.sigma > 0 for c in changes) == pytest.approx(blurred, abs=0.03 if blurred < 1 else 0)
        assert share(c.solarize for c in changes) == pytest.approx(solarised, abs=0.03 if solarised else 0)


@pytest.mark.parametrize(
    "name, low, high",
    [("brightness", 0.6, 1.4), ("contrast", 0.6, 1.4), ("saturation", 0.8, 1.2), ("hue", -0.1, 0.1), ("sigma", 0.1, 2)],
)
def test_factors_are_uniform_in_their_range(drawn, name, low, high):
    values = [getattr(c, name) for c in drawn[0]]
    shares, _ = np.histogram(values, bins=5, range=(low - 1e-6, high + 1e-6))
    assert shares.sum() == 4000
    assert np.allclose(shares / 4000, 0.2, atol=0.03)


def test_every_order_comes_as_often(drawn):
    orders = [c.order for c in drawn[0] if c.order]
    assert len(set(orders)) == len(ORDERS) == 24
    counts = [orders.count(order) for order in ORDERS]
    assert min(counts) > 0.6 * len(orders) / 24  # standard deviation 0.09 of it
    assert max(counts) < 1.4 * len(orders) / 24


def test_what_is_drawn_for_one_operation_does_not_hang_on_another():
    other = PhotometricConfig(brightness=0.1, blur=(1.0, 0.0, 0.0), gray=0.0)
    for n in range(50):
        one, two = draw(numbers(n), 0, PhotometricConfig()), draw(numbers(n), 0, other)
        assert one._replace(brightness=0, gray=False) == two._replace(brightness=0, gray=False)


def test_switched_off_it_changes_nothing(crop):
    off = PhotometricConfig(jitter=0, gray=0, blur=(0, 0, 0), solarize=(0, 0, 0))
    narrow = PhotometricConfig(brightness=0, contrast=0, saturation=0, hue=0, gray=0, blur=(0, 0, 0))
    for n in range(20):
        assert np.array_equal(photometric.apply(crop, draw(numbers(n), 1, off)), crop)
        assert np.array_equal(photometric.apply(crop, draw(numbers(n), 2, narrow)), crop)
        assert np.array_equal(views_pil.apply(crop, draw(numbers(n), 2, narrow)), crop)
