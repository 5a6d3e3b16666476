"""The method against numbers by hand: both terms on two images, the schedules of the published run, positions."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pretrain.backbone import Backbone, BackboneConfig, timm_arguments
from pretrain.centering import Centering, CenteringConfig, teacher_targets
from pretrain.config import PretrainConfig
from pretrain.heads import Head, HeadsConfig
from pretrain.losses import Guessed, Logits, LossesConfig, named_losses
from pretrain.positions import resize_positions
from pretrain.schedules import at
from pretrain.student_teacher import Seen
from recipes.load import load

IMAGES = 4_180_243  # of LUPerson
CENTRE, PATCH_CENTRE = [0.3, -0.1, 0.0], [0.0, 0.2, -0.4]
TAU_S, TAU_T = 0.1, 0.05
# two images, two global views and a local one, three prototypes. Each row is in proportion to a softmax, and all of the
# student's are powers of 1/2, so that every cross-entropy is a number of bits
TEACHER = [[(1, 2, 1), (2, 1, 1)], [(4, 1, 3), (1, 2, 1)]]  # [view][image]
STUDENT = [[(1, 1, 2), (1, 2, 1)], [(2, 1, 1), (1, 1, 2)], [(1, 2, 1), (2, 1, 1)]]
# the one masked patch, of the second image in the second view
TEACHER_PATCH, STUDENT_PATCH = (1, 6, 1), (1, 2, 1)


def logits(weights: list | tuple, temperature: float, centre: list[float]) -> Tensor:
    """Logits [..., 3] whose centred softmax at that temperature is `weights`, normalised."""
    return torch.tensor(centre) + temperature * torch.tensor(weights, dtype=torch.float64).log()


def test_a_step_of_two_images_by_hand():
    cls = logits(TEACHER, TAU_T, CENTRE)
    patch = logits([TEACHER_PATCH], TAU_T, PATCH_CENTRE)
    centres = nn.ModuleDict({kind: Centering(3, CenteringConfig(momentum=0.9)) for kind in ("cls", "patches")})
    centres["cls"].centre.copy_(torch.tensor(CENTRE))
    centres["patches"].centre.copy_(torch.tensor(PATCH_CENTRE))
    every_patch = torch.tensor([1.0, 2.0, -3.0])  # mean logits over the masked patch and all others
    features = torch.zeros(2, 2, 4)
    seen = Seen(Logits(cls.float(), patch.float()), cls.mean((0, 1)).float(), every_patch, features)
    targets = teacher_targets(centres, seen, TAU_T)
    assert targets.cls[1, 0].tolist() == pytest.approx([4 / 8, 1 / 8, 3 / 8], rel=1e-5)
    assert targets.patches[0].tolist() == pytest.approx([1 / 8, 6 / 8, 1 / 8], rel=1e-5)

    # the patch's unit vector is (1, 0), so its logits are the first column of the prototypes
    prototypes = torch.stack([logits(STUDENT_PATCH, TAU_S, [0.0] * 3), torch.tensor([9.0, -9.0, 5.0])], dim=1).float()
    guess = Guessed(logits(STUDENT, TAU_S, [0.0] * 3).float(), torch.tensor([[1.0, 0.0]]), prototypes, features)
    losses = named_losses(guess, targets, torch.tensor([1.0]), LossesConfig(student_temperature=TAU_S))

    # bits of the first image: teacher's view 1 with the student's 2 and local, then teacher's 2 with 1 and local
    first = (0.25 * 1 + 0.5 * 2 + 0.25 * 2) + (0.25 * 2 + 0.5 * 1 + 0.25 * 2)
    first += (0.5 * 2 + 0.125 * 2 + 0.375 * 1) + (0.5 * 2 + 0.125 * 1 + 0.375 * 2)
    second = (0.5 * 2 + 0.25 * 2 + 0.25 * 1) + (0.5 * 1 + 0.25 * 2 + 0.25 * 2)
    second += (0.25 * 2 + 0.5 * 1 + 0.25 * 2) + (0.25 * 1 + 0.5 * 2 + 0.25 * 2)
    assert (first, second) == (6.75, 6.5)
    cls_bits = (first + second) / 2 / (2 * (1 + 1))  # mean over the images; 2 (L + 1) pairs of views
    patch_bits = (0.125 * 2 + 0.75 * 1 + 0.125 * 2) / 1 / 2 / 2  # by one masked patch, two images, two views
    assert (cls_bits, patch_bits) == (1.65625, 0.3125)
    assert losses["loss_cls"].item() == pytest.approx(cls_bits * math.log(2), rel=1e-5)
    assert losses["loss_patch"].item() == pytest.approx(patch_bits * math.log(2), rel=1e-5)
    assert losses["loss"].item() == pytest.approx(1.3646335, rel=1e-5)

    for centre in centres.values():
        centre.end_step()
    # 0.9 (0.3, -0.1, 0) + 0.1 of the mean; it is the old centre + 0.05 ln(1 2 4 1, 2 1 1 2, 1 1 3 1) / 4
    mean = [c + 0.05 * math.log(w) / 4 for c, w in zip(CENTRE, (8, 4, 3), strict=True)]
    expected = [0.9 * c + 0.1 * m for c, m in zip(CENTRE, mean, strict=True)]
    assert centres["cls"].centre.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert centres["patches"].centre.tolist() == pytest.approx([0.1, 0.38, -0.66], rel=1e-5)


# 300 epochs of 4082.26855 steps of 1024 are 1,224,680 steps; the 10 epochs of warm-up end within step 40,822
STEPS, WARM_UP = 1_224_680, 40_822.6855
BETWEEN = STEPS - WARM_UP


@pytest.mark.parametrize(
    "recipe, peak, end", [("personvit_vits16_luperson", 2e-3, 1e-6), ("personvit_vitb16_luperson", 2e-3, 2e-6)]
)
def test_rates_of_the_published_run(recipe, peak, end):
    config = load(PretrainConfig, f"pretrain/{recipe}.yaml", [])
    assert int(config.schedules.epochs * IMAGES / config.loader.batch) == STEPS
    expected = {
        0: 0.0,
        1: peak / WARM_UP,
        20_000: peak * 20_000 / WARM_UP,
        40_822: peak * 40_822 / WARM_UP,
        40_823: peak,  # 0.3 steps past it: the cosine falls by 3e-16
        632_751: (peak + end) / 2,  # half way, to a quarter of a step
        336_787: end + (peak - end) * (1 + math.sqrt(0.5)) / 2,  # a quarter of the way
        928_716: end + (peak - end) * (1 - math.sqrt(0.5)) / 2,  # three quarters
        STEPS - 1: end + (peak - end) * (math.pi / BETWEEN) ** 2 / 4,
    }
    found = {step: at(step, STEPS, IMAGES / 1024, config.loader.batch, config.schedules).lr for step in expected}
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-12)


def test_the_other_values_of_the_published_run():
    config = load(PretrainConfig, "pretrain/personvit_vits16_luperson.yaml", [])
    large = load(PretrainConfig, "pretrain/personvit_vitb16_luperson.yaml", [])

    def values(step: int, recipe: PretrainConfig = config):
        return at(step, STEPS, IMAGES / 1024, 1024, recipe.schedules)

    # a third of the way is a quarter of the change, as cos(pi / 3) = 1/2
    for share, momentum, decay in ((0, 0.996, 0.04), (1 / 3, 0.997, 0.13), (1 / 2, 0.998, 0.22), (2 / 3, 0.999, 0.31)):
        now = values(round(share * STEPS))
        assert now.momentum == pytest.approx(momentum, abs=1e-8)
        assert now.weight_decay == pytest.approx(decay, abs=1e-6)
    assert values(STEPS - 1).momentum == pytest.approx(1, abs=1e-10)
    assert values(STEPS - 1).weight_decay == pytest.approx(0.4, abs=1e-10)
    # epoch 1 begins with step 4083, epoch 29 with 118,386; 29 rises bring 0.04 to 0.07, for ViT-B 49
    for step, epoch in ((0, 0), (4082, 0), (4083, 1), (8164, 1), (8165, 2), (118_385, 28), (118_386, 29)):
        assert values(step).teacher_temperature == pytest.approx(0.04 + 0.03 * epoch / 29)
        assert values(step, large).teacher_temperature == pytest.approx(0.04 + 0.03 * epoch / 49)
    assert values(STEPS - 1).teacher_temperature == 0.07
    assert values(200_031, large).teacher_temperature == pytest.approx(0.07 - 0.03 / 49)
    assert values(200_032, large).teacher_temperature == 0.07
    # the prototypes stay for one epoch, for ViT-B for three
    assert [values(step).freeze_last_layer for step in (0, 4082, 4083)] == [True, True, False]
    assert [values(step, large).freeze_last_layer for step in (12_246, 12_247)] == [True, False]
    assert (config.optim.clip, large.optim.clip, config.optim.clip_by) == (3.0, 0.3, "parameter")


@pytest.mark.parametrize(
    "prototypes, shared, gigabytes", [(8192, True, 1.506), (8192, False, 1.540), (65_536, True, 1.742)]
)
def test_a_full_state_of_vit_b_is_as_large_as_the_published_one(prototypes, shared, gigabytes):
    # float32: student, teacher and two moments of Adam; the published file of "about 1.5 GB" speaks for K = 8192
    with torch.device("meta"):
        backbone = Backbone(timm_arguments(BackboneConfig(name="vit_base_patch16_224"), (256, 128)))
        head = Head(backbone.dim, HeadsConfig(out_dim=prototypes, shared=shared), patches=True)
    count = sum(parameter.numel() for part in (backbone, head) for parameter in part.parameters())
    assert 4 * 4 * count / 1e9 == pytest.approx(gigabytes, abs=1e-3)


def cubic(distance: float, a: float = -0.75) -> float:
    """Keys' kernel of cubic convolution (1981), with the a of OpenCV and torch."""
    d = abs(distance)
    if d < 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0


def weights_of(old: int, new: int) -> np.ndarray:
    """Bicubic resizing of a line as a matrix [new, old], with DINO's 0.1: what lies beyond the border is the border."""
    scale, matrix = (new + 0.1) / old, np.zeros((new, old))
    for place in range(new):
        source = (place + 0.5) / scale - 0.5
        for tap in range(math.floor(source) - 1, math.floor(source) + 3):
            matrix[place, min(max(tap, 0), old - 1)] += cubic(source - tap)
    return matrix


@pytest.mark.parametrize("old, new", [((16, 8), (6, 4)), ((16, 8), (24, 8)), ((14, 14), (16, 8)), ((8, 4), (3, 5))])
def test_bicubic_positions_by_numpy(old, new):
    positions = torch.randn(1, 3 + old[0] * old[1], 5, generator=torch.Generator().manual_seed(0)).double()
    found = resize_positions(positions, old, new, prefix=3, kernel="bicubic")
    assert torch.equal(found[:, :3], positions[:, :3]), "CLS and registers have no place"
    square = positions[0, 3:].numpy().reshape(*old, 5)
    rows, columns = weights_of(old[0], new[0]), weights_of(old[1], new[1])
    assert np.allclose(rows.sum(1), 1)
    expected = np.einsum("rs,ct,std->rcd", rows, columns, square).reshape(-1, 5)
    assert np.allclose(found[0, 3:].numpy(), expected, atol=1e-9)
    without = resize_positions(positions, old, new, prefix=3)
    assert not np.allclose(found[0, 3:].numpy(), without[0, 3:].numpy(), atol=0.05), "the bilinear kernel is another"


def test_the_tenth_that_is_added_counts():
    # a ramp of 8 positions on 4: with scale 4.1 / 8 place 1 lies at 1.5 * 8 / 4.1 - 0.5 = 2.427, without it at 2.5
    ramp = torch.arange(8.0).view(1, 8, 1)
    found = resize_positions(ramp, (1, 8), (1, 4), prefix=0, kernel="bicubic").flatten()
    # cubic convolution gives a straight line back, and (a + 1/2) 2 t (1 - t) (2 t - 1) besides
    t = 1.5 * 8 / 4.1 - 0.5 - 2
    assert found[1].item() == pytest.approx(2 + t + 0.5 * t * (1 - t) * (1 - 2 * t), abs=1e-5)
    assert abs(found[1].item() - 2.5) > 0.05


@torch.no_grad()
def test_local_crops_get_the_bicubic_positions(make_backbone):
    backbone = make_backbone().eval()
    images = torch.zeros(1, 3, 32, 16)
    # blocks that add nothing and patches that are zero: a token is its position under the norm
    backbone.vit.blocks = backbone.vit.blocks[:1]
    for parameter in backbone.vit.blocks.parameters():
        parameter.zero_()
    backbone.vit.patch_embed.proj.bias.zero_()
    rows, columns = weights_of(8, 4), weights_of(4, 2)
    square = backbone.vit.pos_embed[0, 1:].numpy().reshape(8, 4, 32).astype(float)
    expected = torch.from_numpy(np.einsum("rs,ct,std->rcd", rows, columns, square).reshape(8, 32)).float()
    assert torch.allclose(backbone(images).patches[0], backbone.vit.norm(expected), atol=1e-4)
