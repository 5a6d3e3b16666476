"""Our step against bench/textbook_step: the same function, computed the slow and obvious way."""

import dataclasses
import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import small
import torch
from torch import Tensor, nn

from pretrain.heads import HeadsConfig

BENCH = Path(__file__).resolve().parent.parent / "bench"
LOCALS, DROP_PATH = 3, 0.4
# float32 keeps 7 digits; the two ways add in another order
CLOSE = 1e-5


@pytest.fixture(scope="module")
def bench():
    """Imports a module below bench/ by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        yield importlib.import_module


@pytest.fixture(scope="module")
def ways(bench):
    """The modules `textbook_step` and `textbook_step.ours`."""
    return bench("textbook_step"), bench("textbook_step.ours")


@pytest.fixture(scope="module")
def make_pair(ways, make_backbone):
    """Both ways with equal weights; keyword arguments change the settings."""
    textbook, ours = ways

    def build(head: dict | None = None, bf16: bool = False, **given):
        config = HeadsConfig(**{"out_dim": 48, "hidden_dim": 40, "bottleneck_dim": 128} | (head or {}))
        backbone = make_backbone(drop_path=DROP_PATH)
        student = ours.Student(backbone, ours.Head(backbone.dim, config), ours.PhotometricConfig(), True).train()
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in student.parameters():  # biases and the mask embedding start at 0, which would hide them
                parameter.add_(0.05 * torch.randn_like(parameter))
        weights = {name: value.clone() for name, value in student.state_dict().items()}
        shape = ours.shape_of(student, bool(config.teacher_shared))
        # The keys' biases have no gradient: softmax does not feel them. AdamW makes steps of full size out of the
        # rounding that is left of it, unless eps is larger than that.
        settings = textbook.Settings(**{"lr": 1e-3, "eps": 1e-3, "clip": 0.05} | given)
        precision = "same" if bf16 else "float32"
        mine = ours.OurStep(student, settings, bf16, teacher_shared=bool(config.teacher_shared))
        return mine, textbook.TextbookStep(weights, shape, DROP_PATH, settings, precision)

    return build


@pytest.fixture(scope="module")
def draw(ways):
    """Batch number n in both forms."""
    ours = ways[1]

    def build(number: int = 0, local_count: int = LOCALS):
        batch = ours.draw_batch(ours.Crops(4, local_count, (64, 32), (32, 16)), (8, 4), 4, number)
        return batch, ours.images_of(batch)

    return build


def apart(one: Tensor, other: Tensor) -> float:
    """|one - other| / |other|."""
    return float((one - other).detach().norm() / other.detach().norm())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


def farthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative difference of two sets of tensors with the same names, and its name."""
    assert set(found) == set(expected)
    return max((apart(found[name], expected[name]), name) for name in found)


def difference(ours, textbook, batch, images) -> float:
    """Forward and backward of both: the largest relative difference of losses and gradients."""
    losses, expected = ours.gradients(batch), textbook.gradients(images)
    own = gradients(ours.student)
    return max(farthest(losses, expected)[0], farthest(own, gradients(textbook.student))[0])


HEADS = {
    "shared": {},
    "unshared": {"shared": False},
    "unshared, teacher shared": {"shared": False, "teacher_shared": True},
    "fixed length": {"norm_last_layer": True},
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_losses_and_gradients_are_those_of_the_textbook(make_pair, draw, head):
    ours, textbook = make_pair(head)
    batch, images = draw()
    masked = batch.masks.flatten(2).any(-1)
    assert masked.any(), "some views have a mask"
    assert not masked.all(), "and some have none"
    assert (batch.global_drops[..., 2:] < DROP_PATH).any(), "drop path drops something"
    losses, expected = ours.gradients(batch), textbook.gradients(images)
    for name in ("loss", "loss_cls", "loss_patch"):
        assert losses[name].item() == pytest.approx(expected[name].item(), rel=CLOSE)
    found, theirs = gradients(ours.student), gradients(textbook.student)
    assert all(value.norm() > 0 for value in theirs.values())
    assert farthest(found, theirs) < (CLOSE,)


@pytest.mark.parametrize("local_count", [LOCALS, 0])
@pytest.mark.parametrize("head", [HEADS["shared"], HEADS["unshared, teacher shared"]], ids=["shared", "unshared"])
def test_three_steps_end_at_the_same_student_teacher_and_centres(make_pair, draw, head, local_count):
    ours, textbook = make_pair(head, momentum=0.9)
    before = {name: value.clone() for name, value in ours.student.named_parameters()}
    for number in range(3):
        batch, images = draw(number, local_count)
        losses, expected = ours.gradients(batch), textbook.gradients(images)
        assert farthest(losses, expected) < (CLOSE,)
        norms = torch.stack([value.norm() for value in gradients(textbook.student).values()])
        assert 0 < (norms > textbook.settings.clip).sum() < len(norms), "some gradients are clipped, some are not"
        ours.update()
        textbook.update()
    for network in ("student", "teacher"):
        own, theirs = (dict(getattr(way, network).named_parameters()) for way in (ours, textbook))
        assert farthest(own, theirs) < (CLOSE,)
        # what the steps changed is some thousandths of the values, so it has fewer digits
        own, theirs = ({n: p - before[n] for n, p in values.items()} for values in (own, theirs))
        assert farthest(own, theirs) < (2e-3,)
    assert apart(ours.centres["cls"].centre, textbook.centre[0]) < CLOSE
    assert apart(ours.centres["patches"].centre, textbook.patch_centre[0, 0]) < CLOSE


def _weight(textbook, images):
    with torch.no_grad():
        textbook.student.backbone.vit.blocks[0].mlp.fc1.weight[0, 0] += 1e-2
    return images


def _teacher_weight(textbook, images):
    with torch.no_grad():
        textbook.teacher.head.mlp[0].weight[0, 0] += 1e-2
    return images


def _temperature(textbook, images):
    textbook.settings = dataclasses.replace(textbook.settings, teacher_temperature=0.0401)
    return images


def _centre(textbook, images):
    textbook.patch_centre += torch.linspace(0, 0.01, textbook.patch_centre.numel())
    return images


def _one_patch(textbook, images):
    mask = images.masks[1].clone()
    flat = mask[3].view(-1)
    flat[int(flat.nonzero()[0])] = False
    return images._replace(masks=[images.masks[0], mask])


def _one_draw(textbook, images):
    draws = [each.clone() for each in images.draws]
    draws[-1][0, 2] = 1.0 - draws[-1][0, 2].round()  # on the other side of the rate
    return images._replace(draws=draws)


def _local_crop(textbook, images):
    return images._replace(crops=[*images.crops[:-1], images.crops[-1].flip(-1)])


FAULTS = (_weight, _teacher_weight, _temperature, _centre, _one_patch, _one_draw, _local_crop)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__.strip("_"))
def test_the_comparison_sees_a_small_fault(make_pair, draw, fault):
    ours, textbook = make_pair()
    batch, images = draw()
    assert difference(ours, textbook, batch, fault(textbook, images)) > 10 * CLOSE


def test_in_bf16_both_are_close(make_pair, draw):
    ours, textbook = make_pair(bf16=True)
    batch, images = draw()
    losses, expected = ours.gradients(batch), textbook.gradients(images)
    assert farthest(losses, expected) < (2e-3,)
    far, name = farthest(gradients(ours.student), gradients(textbook.student))
    assert far < 0.1, name  # bf16 keeps 8 bits, and a gradient is a sum of many such products
    assert far > 10 * CLOSE, "it is not float32"


def test_what_each_precision_keeps_in_float32(ways, make_pair, draw):
    textbook_step, (_, textbook) = ways[0], make_pair()
    weights, crops = textbook.student.state_dict(), draw()[1].crops
    shape = ways[1].shape_of(make_pair()[0].student)
    types = {"float32": torch.float32, "same": torch.float32, "published": torch.bfloat16}
    for precision, expected in types.items():
        step = textbook_step.TextbookStep(weights, shape, 0.0, precision=precision)
        with step._autocast():
            tokens = step.student.backbone(crops[0])
            logits = step.student.head(tokens)
            mlp = step.student.head.mlp(tokens)
        assert {each.dtype for each in logits} == {expected}, precision
        assert mlp.dtype == (torch.float32 if precision == "float32" else torch.bfloat16)


def test_a_loss_that_is_not_finite_stops_the_textbook(make_pair, draw):
    _, textbook = make_pair()
    _, images = draw()
    images.crops[0][0, 0, 0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        textbook.gradients(images)


def test_kinds_of_operations(bench):
    kind_of = bench("pairs.kinds").kind_of
    k = 8192
    assert kind_of("aten::addmm", [], [384, 1536, k], k) == "GEMM"
    assert kind_of("aten::bmm", ["aten::matmul"], [64], k) == "attention"
    assert kind_of("aten::_softmax", [], [129], k) == "attention"
    assert kind_of("aten::_softmax", [], [k], k) == "softmax + loss"
    assert kind_of("aten::mul", ["autograd::engine::evaluate_function: MulBackward0"], [k, k], k) == "softmax + loss"
    assert kind_of("aten::mul", [], [384], k) == "elementwise, norms"
    assert kind_of("aten::lerp_", ["aten::_foreach_lerp_", "EMA"], [384], k) == "EMA"
    assert kind_of("aten::addcdiv_", ["Optimizer.step#AdamW.step"], [384], k) == "optimiser"
    assert kind_of("aten::copy_", ["aten::to"], [384], k) == "copies"


def test_a_child_answers_from_its_own_process_and_tells_its_errors(bench):
    child = bench("pairs.children").Child
    with child("a list", list, [7, 8]) as asked:
        assert asked.ask("index", 8) == 1
        assert asked.process.is_alive()
        with pytest.raises(RuntimeError, match=r"(?s)process of a list.*ValueError: 9 is not in list"):
            asked.ask("index", 9)
    assert not asked.process.is_alive()


@pytest.mark.soak
def test_the_benches_end_with_their_line(tmp_path):
    tiny = ["--model", "vit_tiny_patch16_224", "--batch", "2", "--out-dim", "64", "--rounds", "1", "--steps", "1"]
    for script, more in (
        ("step", ["--profile"]),
        ("step", ["--precision", "bf16"]),
        ("throughput", ["--images", "64"]),
    ):
        command = [sys.executable, str(BENCH / f"{script}.py"), *tiny, *more, "--json", str(tmp_path / "line.json")]
        done = subprocess.run(command, capture_output=True, text=True, env=small.environment(), timeout=600)
        assert done.returncode == 0, done.stderr
        line = json.loads(done.stdout.splitlines()[-1])
        assert line == json.loads((tmp_path / "line.json").read_text())
        assert line["name"] == script
        assert line["ratio"] > 0
        assert {"ours", "textbook", "unit", "peak_mb", "machine", "versions"} <= set(line)
