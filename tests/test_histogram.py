"""The colour baseline against histograms worked out by hand."""

import numpy as np
import pytest
from PIL import Image

from finetune.histogram import HistogramConfig, histogram_features


def two_halves(upper: str, lower: str) -> Image.Image:
    image = Image.new("RGB", (32, 64), upper)
    image.paste(lower, (0, 32, 32, 64))
    return image


def test_two_stripes_by_hand():
    # red: H 0, S 255, V 255; black: H 0, S 0, V 0. One stripe each, half of the pixels in one bin: sqrt(1/2)
    config = HistogramConfig(stripes=2, hue=3, saturation=2, value=2)
    feature = histogram_features([two_halves("red", "black")], config)[0].reshape(2, 3, 2, 2)
    expected = np.zeros((2, 3, 2, 2))
    expected[0, 0, 1, 1] = expected[1, 0, 0, 0] = np.sqrt(0.5)
    np.testing.assert_allclose(feature, expected, atol=1e-6)


def test_inner_product_is_the_part_of_equal_stripes():
    pictures = [two_halves("red", "blue"), two_halves("red", "green"), two_halves("blue", "red")]
    features = histogram_features(pictures)
    np.testing.assert_allclose(features @ features.T, [[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1]], atol=1e-6)


def test_features_have_length_one_whatever_the_image():
    rng = np.random.default_rng(0)
    sizes = [(40, 80), (7, 5), (128, 256)]
    images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    features = histogram_features(iter([*images, images[0].convert("L")]))
    assert features.shape == (4, 8 * 8 * 4 * 4)
    assert features.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)


def test_hue_of_grey_does_not_count():
    # nearly grey with opposite hues: the same bin; saturated with the same two hues: different ones
    grey = histogram_features([Image.new("RGB", (8, 8), colour) for colour in ((131, 128, 128), (128, 128, 131))])
    full = histogram_features([Image.new("RGB", (8, 8), colour) for colour in ((131, 0, 0), (0, 0, 131))])
    assert grey[0] @ grey[1] == pytest.approx(1, abs=1e-6)
    assert full[0] @ full[1] == 0


def test_no_images():
    assert histogram_features([]).shape == (0, 1024)
