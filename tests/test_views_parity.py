"""The fast views against the reference on Pillow: the same distribution of pixels, the same spectra, no aliasing.

Both ways get the same random numbers, so what differs is the pixels and not the draw.
"""

import io

import numpy as np
import pytest
from PIL import Image

from pretrain import photometric, views, views_pil
from pretrain.photometric import PhotometricConfig
from pretrain.views import ViewsConfig
from shards.seeds import generator
from shards.sources import figures

VIEWS = ViewsConfig(local_count=4)
SIZES = ((256, 128), (384, 150), (300, 120), (160, 64))
LUMA = np.array(photometric.LUMA)


def drawn_people(count: int) -> list[np.ndarray]:
    config = figures.Config(role="unlabeled", identities=count, images_per_identity=1)
    return [np.asarray(Image.open(io.BytesIO(record.read()))) for record in figures.records(config)]


def noise(count: int, coarse: bool) -> list[np.ndarray]:
    """Pixels, or smooth spots over a sixteenth of the image, of any colour; in several sizes."""
    rng, made = np.random.default_rng(0), []
    for number in range(count):
        height, width = SIZES[number % len(SIZES)]
        if coarse:
            spots = Image.fromarray(rng.integers(0, 256, (8, 4, 3), dtype=np.uint8))
            made.append(np.asarray(spots.resize((width, height), Image.Resampling.BICUBIC)))
        else:
            made.append(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    return made


SETS = {
    "figures": lambda: drawn_people(48),
    "smooth": lambda: noise(32, coarse=True),
    "noise": lambda: noise(16, coarse=False),
}


def power(pixels: np.ndarray) -> np.ndarray:
    """Power of the luma by frequency, mean over eight rings from 0 to half a cycle a pixel; units of white noise.

    White noise with a standard deviation of one level out of 256 has power 1 in all rings.
    """
    gray = pixels @ LUMA
    window = np.outer(np.hanning(gray.shape[0]), np.hanning(gray.shape[1]))
    spectrum = np.abs(np.fft.fft2((gray - gray.mean()) * window)) ** 2 / (window**2).sum()
    radius = np.hypot(np.fft.fftfreq(gray.shape[0])[:, None], np.fft.fftfreq(gray.shape[1])[None])
    ring = np.minimum((radius * 16).astype(int), 8).ravel()  # the ninth are the corners
    return (np.bincount(ring, spectrum.ravel()) / np.bincount(ring))[:8]


class Found:
    """Histograms int64 [3 channels, 256] and spectra of the views of each kind, made in one way."""

    def __init__(self, way, images: list[np.ndarray], colour: PhotometricConfig):
        self.histograms, self.spectra = np.zeros((3, 3, 256), dtype=np.int64), np.zeros((3, 8))
        crop, change = (views_pil.crop, views_pil.apply) if way is views_pil else (views.crop, photometric.apply)
        for number, image in enumerate(images):
            table = generator(0, "test/parity", number).random((6, views.NUMBERS + photometric.NUMBERS)).tolist()
            for view, u in enumerate(table):
                kind = min(view, 2)
                box = views.draw_box(u, image, kind == 2, VIEWS)
                changes = photometric.draw(u[views.NUMBERS :], kind, colour)
                pixels = change(crop(image, box, VIEWS.local_size if kind == 2 else VIEWS.global_size), changes)
                self.histograms[kind] += [np.bincount(pixels[..., c].ravel(), minlength=256) for c in range(3)]
                self.spectra[kind] += power(pixels) / len(images) / (4 if kind == 2 else 1)

    def shares(self) -> np.ndarray:
        return self.histograms / self.histograms.sum(-1, keepdims=True)


@pytest.fixture(scope="module", params=SETS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def images(name):
    return SETS[name]()


@pytest.fixture(scope="module")
def both(images):
    return [Found(way, images, PhotometricConfig()) for way in (views, views_pil)]


def test_pixels_have_the_distribution_of_the_reference(both):
    level = np.arange(256) / 255
    ours, theirs = (found.shares() for found in both)
    means = [shares @ level for shares in (ours, theirs)]
    deviations = [np.sqrt(s @ level**2 - m**2) for s, m in zip((ours, theirs), means, strict=True)]
    assert np.abs(means[0] - means[1]).max() <= 0.01
    assert np.abs(deviations[0] - deviations[1]).max() <= 0.01
    distance = np.abs(ours.cumsum(-1) - theirs.cumsum(-1)).max()  # Kolmogorov and Smirnov's
    assert distance <= 0.02
    assert distance > 0, "the two ways are not the same code"


def within(found: list[Found], share: float) -> bool:
    """Whether the power agrees in each ring, to this share and one level: Pillow rounds to 8 bits more often."""
    ours, theirs = (each.spectra for each in found)
    return bool((np.abs(ours - theirs) <= share * theirs + 1).all())


@pytest.mark.parametrize(
    "colour",
    [PhotometricConfig(jitter=0, gray=0, solarize=(0, 0, 0)), PhotometricConfig(hue=0)],
    ids=["resizing and blur", "all but hue"],
)
def test_spectra_are_those_of_the_reference(images, colour):
    assert within([Found(way, images, colour) for way in (views, views_pil)], 0.03)


def test_spectra_with_the_hue_turned_differ_little(name, both):
    # HSV has creases where the hue passes a primary colour: smooth strong colours get edges there, and none from us
    assert within(both, 0.2) or name == "smooth"


def test_the_check_finds_a_wrong_blur_and_a_missing_jitter():
    images = SETS["noise"]()[:4]
    right = Found(views, images, PhotometricConfig())
    narrow = Found(views, images, PhotometricConfig(blur_sigma=(0.1, 1.5)))
    assert not within([narrow, right], 0.2)
    pale = Found(views, images, PhotometricConfig(brightness=0.2))
    assert np.abs(pale.shares().cumsum(-1) - right.shares().cumsum(-1)).max() > 0.02


@pytest.mark.parametrize("cycles", [40, 60, 75])  # over the crop; 48 rows show at most 24
def test_what_the_small_view_cannot_show_does_not_come_back(cycles):
    # stripes of full contrast across a crop of 0.8 of an image: taking every fifth row would fold them into wide ones
    rows = np.arange(240)
    stripes = np.rint(127.5 + 127.5 * np.sin(2 * np.pi * cycles * (rows + 0.5) / 240)).astype(np.uint8)
    image = np.repeat(stripes, 120).reshape(240, 120, 1).repeat(3, -1)
    assert image[2::5].std() > 60
    inner = slice(4, -4)  # at the border the filter is cut
    for way in (views, views_pil):
        small = way.crop(image, (0, 0, 120, 240, 0), (48, 32))
        assert small[inner].std() < 6


def test_fine_detail_that_fits_stays():
    rows = np.arange(240)
    stripes = np.rint(127.5 + 127.5 * np.sin(2 * np.pi * 10 * (rows + 0.5) / 240)).astype(np.uint8)
    image = np.repeat(stripes, 120).reshape(240, 120, 1).repeat(3, -1)
    assert views.crop(image, (0, 0, 120, 240, 0), (48, 32)).std() > 0.9 * image.std()
