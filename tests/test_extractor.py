"""Images of any kind to features: the same numbers whatever form they come in, and what cannot be used is named."""

import io
from pathlib import Path

import numpy as np
import pytest
import small
import torch
from PIL import Image

from finetune import backbones, models
from finetune.augment import Augment, AugmentConfig
from finetune.backbones import BackboneConfig
from finetune.extractor import Extractor, clipped, grid, pooled
from finetune.methods import build
from finetune.methods.base import Parts
from finetune.sampling import SamplingConfig
from finetune.verification import Calibration
from pretrain.backbone import Backbone, timm_arguments
from pretrain.checkpoint import save_teacher
from recipes.errors import UserError
from shards.schema import BadSample

SIZE = (48, 16)
NORMALIZE = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}
CALIBRATION = {
    **{"threshold": 0.5, "far": 1e-3, "tar": 0.7, "asked_far": 1e-3, "slope": 10.0, "intercept": -5.0},
    **{"same_pairs": 10, "different_pairs": 1000, "title": "drawn people", "protocol": {"same_camera": "drop"}},
}


def a_vit(**more) -> BackboneConfig:
    return BackboneConfig(name="vit_tiny_patch16_224", patch_size=8, embed_dim=32, depth=2, num_heads=2, **more)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    backbone = Backbone(timm_arguments(a_vit(), SIZE))
    backbone.initialise("fan_in")
    save_teacher(folder / "teacher", backbone, {"normalize": NORMALIZE})
    return folder


def fine_tuned(folder: Path, config: BackboneConfig, method: dict, **facts) -> Path:
    """A run folder with a model of random weights, whose BatchNorm has seen nothing."""
    torch.manual_seed(1)
    parts = Parts(backbones.build(backbones.arguments_of(config, SIZE)), 5, 2, SamplingConfig(), 0)
    augment = AugmentConfig(height=SIZE[0], width=SIZE[1], pad=4)
    models.save(folder / "model", build(method, parts), method, augment, {"classes": 5, "cameras": 2, **facts})
    return folder


@pytest.fixture(scope="module")
def extractor(teacher) -> Extractor:
    return Extractor(teacher, device="cpu", batch=3)


def picture(seed: int, height: int = 60, width: int = 25) -> Image.Image:
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 2, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_the_form_of_an_image_does_not_matter(extractor, tmp_path):
    image = picture(0)
    path = tmp_path / "a person.png"
    path.write_bytes(encoded(image))
    forms = [path, str(path), image, np.asarray(image), path.read_bytes(), path.read_bytes, lambda: image]
    features = extractor(forms)
    assert features.shape == (7, 32)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, features[:1].repeat(7, 0), atol=1e-6)
    # a mean over its channels would not see that they were swapped
    assert abs(extractor(np.asarray(image)[:, :, ::-1])[0] - features[0]).max() > 1e-3


def test_features_are_those_of_the_model_alone(extractor, teacher):
    images = [picture(seed, 40 + seed, 30) for seed in range(8)]  # three batches, the last of two
    model, augment = models.load_stored(str(teacher))
    view = Augment(augment).test_view
    with torch.no_grad():
        expected = torch.cat([model.eval().embed(torch.from_numpy(view(image))[None]) for image in images])
    np.testing.assert_allclose(extractor(images), expected, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(extractor(iter(images)), axis=1), 1, atol=1e-6)


def test_one_image_and_none(extractor):
    one = extractor([picture(0)])
    np.testing.assert_array_equal(extractor(picture(0)), one)
    np.testing.assert_array_equal(extractor(np.asarray(picture(0))), one)
    assert extractor([]).shape == (0, 32)
    assert extractor.crops(picture(0), []).shape == (0, 32)
    assert extractor.tracklets([]).shape == (0, 32)
    assert extractor.patches([]).shape == (0, 6, 2, 32)


def test_gray_transparent_and_palette_images_are_taken_as_rgb(extractor):
    gray = picture(3).convert("L")
    np.testing.assert_array_equal(extractor(gray), extractor(gray.convert("RGB")))
    np.testing.assert_array_equal(extractor(encoded(picture(3).convert("P"))), extractor(picture(3).convert("P")))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (np.zeros((4, 4), np.uint8), r"image 1 is an array of uint8 \[4, 4\]; expected uint8 \[H, W, 3\]"),
        (np.zeros((4, 4, 3), np.float32), "array of float32"),
        (np.zeros((0, 4, 3), np.uint8), "array of uint8"),
        (7, "image 1 is a int"),
        (b"", "image 1 is empty"),
        ("nowhere.jpg", "nowhere.jpg cannot be read: No such file"),
    ],
)
def test_what_is_no_image_is_named(extractor, wrong, told):
    with pytest.raises(UserError, match=told):
        extractor([picture(0), wrong, picture(1)])


def test_damaged_images_are_left_out_where_it_is_asked_for(extractor, tmp_path):
    (tmp_path / "half.png").write_bytes(encoded(picture(0))[:60])
    images = [picture(0), tmp_path / "half.png", picture(1), tmp_path / "gone.png", b"no image"] + [picture(2)] * 4
    bad: dict[int, BadSample] = {}
    found = list(extractor.stream(images, on_bad=bad.__setitem__))
    assert [place for places, _ in found for place in places] == [0, 2, 5, 6, 7, 8]
    assert sorted(bad) == [1, 3, 4]
    assert "half.png is a damaged or truncated PNG" in str(bad[1])
    np.testing.assert_allclose(found[0][1], extractor([images[0], images[2]]), atol=1e-6)
    with pytest.raises(BadSample, match=r"half\.png"):
        extractor(images)


def test_a_stream_can_be_left_early_and_reads_no_further_than_it_must(extractor):
    taken = []

    def endless():
        for number in range(10**9):
            taken.append(number)
            yield picture(number)

    stream = extractor.stream(endless())
    next(stream)
    stream.close()
    assert len(taken) <= 12, "four batches of three: one embedded, one under way, two ahead"


def test_crops_of_a_frame_are_its_pixels(extractor):
    frame = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    boxes = np.array([[10, 20, 40, 80], [-30, -5, 25.4, 60], [100, 30, 500, 500]])
    expected = [frame[20:80, 10:40], frame[0:60, 0:25], frame[30:90, 100:120]]
    np.testing.assert_array_equal(extractor.crops(frame, boxes), extractor(expected))


@pytest.mark.parametrize(
    "box", [(50, 10, 50, 20), (60, 10, 50, 20), (200, 0, 300, 50), (0, 0, float("nan"), 9), (1, 2, 3), (-9, -9, 0, 5)]
)
def test_a_bad_box_is_named(extractor, box):
    with pytest.raises(UserError, match="box 1 is"):
        extractor.crops(picture(0, 90, 120), [(0, 0, 50, 50), box])


def test_boxes_keep_a_pixel_where_they_hold_half_of_one():
    assert clipped((0.4, 0.6, 1.4, 1.6), 9, 9, "box") == (0, 1, 1, 2)


def test_a_tracklet_is_the_mean_of_its_images(extractor):
    images = [picture(seed) for seed in range(7)]
    found = extractor.tracklets([images[:1], images[1:5], images[5:]])
    features = extractor(images).astype(np.float64)
    for row, part in enumerate((slice(0, 1), slice(1, 5), slice(5, 7))):
        mean = features[part].mean(0)
        np.testing.assert_allclose(found[row], mean / np.linalg.norm(mean), atol=1e-6)
    with pytest.raises(UserError, match="tracklet 1 holds no images"):
        extractor.tracklets([images, []])
    np.testing.assert_allclose(pooled(np.float32([[3, 0], [0, 4]]), np.array([0])), [[0.6, 0.8]])


def test_patches_are_the_tokens_in_their_places(extractor):
    images = [picture(seed) for seed in range(4)]
    found = extractor.patches(images)
    assert found.shape == (4, 6, 2, 32)
    views = torch.from_numpy(np.stack([extractor.augment.test_view(image) for image in images]))
    with torch.no_grad():
        tokens = extractor.model.backbone.vit.forward_features(views)[:, 1:]
    np.testing.assert_allclose(found.reshape(4, 12, 32), tokens, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "places", "expected"), [((256, 128), 128, (16, 8)), ((384, 128), 48, (12, 4)), ((256, 128), 210, (21, 10))]
)
def test_the_grid_of_square_cells(size, places, expected):
    assert grid(size, places) == expected


def test_a_cnn_gives_features_and_places(tmp_path):
    config = BackboneConfig(name="resnet18", last_stride=1, drop_path=0)
    found = Extractor(fine_tuned(tmp_path, config, {"name": "bot"}), device="cpu")
    assert found([picture(0)]).shape == (1, 512)
    assert found.patches(picture(0)).shape == (1, 3, 1, 512)


def test_a_mirrored_person_is_the_same_with_flip(teacher, extractor):
    image, both = picture(0), Extractor(teacher, device="cpu", flip=True)
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    np.testing.assert_allclose(both([image]), both([mirrored]), atol=1e-5)
    mean = extractor([image, mirrored]).sum(0)
    np.testing.assert_allclose(both([image])[0], mean / np.linalg.norm(mean), atol=1e-5)


def test_cameras_reach_a_model_that_looks_at_them(tmp_path):
    method = {"name": "bot", "sie": {"scale": 20.0}}
    found = Extractor(fine_tuned(tmp_path, a_vit(drop_path=0), method), device="cpu")
    image = picture(0)
    first, second, unknown = found([image] * 3, cameras=[0, 1, -2])
    assert abs(first - second).max() > 1e-4
    np.testing.assert_allclose(found([image])[0], unknown, atol=1e-6)
    assert np.isfinite(found.patches(image)).all()
    with pytest.raises(UserError, match="1 cameras for 2 images"):
        found([image] * 2, cameras=[0])


def test_a_threshold_comes_with_the_model(tmp_path, extractor):
    assert extractor.calibration is None
    found = Extractor(fine_tuned(tmp_path, a_vit(drop_path=0), {"name": "bot"}, calibration=CALIBRATION), device="cpu")
    assert found.calibration == Calibration(**CALIBRATION)
    assert found.calibration.probability(0.5) == pytest.approx(0.5)


def test_bf16_is_near_and_wrong_settings_are_told(teacher, extractor):
    images = [picture(seed) for seed in range(3)]
    half = Extractor(teacher, device="cpu", precision="bf16")(images)
    assert half.dtype == np.float32
    assert (half * extractor(images)).sum(1).min() > 0.999
    with pytest.raises(UserError, match="precision = 'fp16'"):
        Extractor(teacher, precision="fp16")
    with pytest.raises(UserError, match="is no checkpoint"):
        Extractor(small.ROOT / "nothing-here")
