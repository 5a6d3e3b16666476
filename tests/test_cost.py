"""What a step costs: against published figures, torch's own counter, the bytes that autograd keeps, a real process."""

import subprocess
import sys

import pytest
import small
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pretrain import checkpoint, cost, optim, student_teacher
from pretrain.backbone import Backbone, BackboneConfig, timm_arguments
from pretrain.batch import Batch
from pretrain.centering import Centering, CenteringConfig, teacher_targets
from pretrain.heads import Head, HeadsConfig
from pretrain.losses import LossesConfig, named_losses
from pretrain.masks import MasksConfig
from pretrain.optim import OptimConfig
from pretrain.photometric import PhotometricConfig
from pretrain.student_teacher import Student, build_teacher
from pretrain.views import ViewsConfig

VIEWS = ViewsConfig(global_size=(64, 32), local_size=(32, 16), local_count=3)
HEAD = HeadsConfig(out_dim=64, hidden_dim=48, bottleneck_dim=16)
CPU, CUDA = ("cpu", torch.float32), ("cuda", torch.bfloat16)


@pytest.fixture(autouse=True)
def no_padding(monkeypatch):
    """The rows that fill a shape up are no work that anybody wants; at the real sizes they are a few in a hundred."""
    monkeypatch.setattr(student_teacher, "PADDED", 1)


def built(mim: bool = True, views: ViewsConfig = VIEWS, head: HeadsConfig = HEAD, **backbone) -> Student:
    """A student; keyword arguments change the backbone of 3 blocks."""
    given = {
        "name": "vit_tiny_patch16_224",
        "patch_size": 8,
        "embed_dim": 64,
        "depth": 3,
        "num_heads": 2,
        "drop_path": 0.0,
    }
    config = BackboneConfig(**given | backbone)
    torch.manual_seed(0)
    vit = Backbone(timm_arguments(config, views.global_size), masked=mim, drop_path=config.drop_path)
    vit.initialise(config.init)
    return Student(vit, Head(vit.dim, head, mim), PhotometricConfig(), mim)


def whole(name: str, **head) -> dict[str, float]:
    """Items of the published recipe on a named ViT, everything on all tokens; no weights are made."""
    with torch.device("meta"):
        student = built(views=ViewsConfig(), name=name, patch_size=16, embed_dim=None, depth=None, num_heads=None)
    sizes = cost.sizes(student.backbone, ViewsConfig(), MasksConfig(), True, CUDA)
    return cost.step_flops(sizes, HeadsConfig(**head), textbook=True)


# forward at 256 x 128: 2.93 and 11.34 G multiply-adds; a step of iBOT with 6 local crops of 96 x 64 and K = 8192: 82
# and 276 GFLOP, with K = 65536 113. Worked out from the papers' sizes, without this code
@pytest.mark.parametrize(
    "name, forward, step", [("vit_small_patch16_224", 2.93, 82), ("vit_base_patch16_224", 11.34, 276)]
)
def test_the_published_sizes_cost_what_was_worked_out(name, forward, step):
    items = whole(name)
    assert items["teacher, backbone"] / 2 / 2e9 == pytest.approx(forward, rel=2e-3)
    assert sum(items.values()) / 1e9 == pytest.approx(step, rel=0.01)
    if name.startswith("vit_small"):
        assert sum(whole(name, out_dim=65536).values()) / 1e9 == pytest.approx(113, rel=0.01)


def test_half_of_the_views_are_masked_by_30_per_cent():
    # {0, U(0.1, 0.5)} on 16 x 8 patches, simulated: 14.5 % of all patches
    assert cost.masked_share(MasksConfig(), (16, 8)) == pytest.approx(0.145, rel=0.03)
    assert cost.masked_share(MasksConfig(ratios=(0.0,), spreads=(0.0,)), (16, 8)) == 0


class Parts:
    """What a step needs beside the student."""

    def __init__(self, student: Student, batch: Batch):
        self.student, self.teacher, self.batch = student, build_teacher(student), batch
        kinds = ("cls", "patches") if student.mim else ("cls",)
        self.centres = nn.ModuleDict({kind: Centering(HEAD.out_dim, CenteringConfig()) for kind in kinds})

    def step(self, half: bool = False) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            seen, guessed = self.teacher(self.batch), self.student(self.batch)
        targets = teacher_targets(self.centres, seen, 0.04)
        config = LossesConfig(patch_weight=float(self.student.mim))
        named_losses(guessed, targets, self.batch.mask_weights, config)["loss"].backward()


CASES = {
    "MIM": {},
    "DINO only": {"mim": False},
    "prototypes of their own": {"head": HEAD.model_copy(update={"shared": False})},
    "registers": {"registers": 4},
    "depth that skips": {"drop_path": 0.4, "depth": 6},
    "a stem of convolutions": {"stem": "ics", "patch_size": 16},
}


@pytest.mark.parametrize("given", CASES.values(), ids=list(CASES))
def test_flops_are_those_that_torch_counts(make_batch, given):
    student = built(**given)
    batch, head = make_batch(8, masks={"ratios": (0.3,), "spreads": (0.2,)}), given.get("head", HEAD)
    if student.backbone.grid != (8, 4):  # the stem makes half as many rows and columns
        masks = batch.masks[:, :, ::2, ::2]
        batch = Batch(**{**vars(batch), "masks": masks, "masked": masks.flatten().nonzero().squeeze(1)})
        batch = Batch(**{**vars(batch), "mask_weights": torch.ones(len(batch.masked))})
    places = len(student.backbone.drops)
    drops = torch.rand(2 + VIEWS.local_count, batch.size, places, generator=torch.Generator().manual_seed(1))
    batch = Batch(**{**vars(batch), "global_drops": drops[:2], "local_drops": drops[2:]})
    sizes = cost.sizes(student.backbone, VIEWS, MasksConfig(), student.mim, CPU)
    sizes = sizes._replace(masked=len(batch.masked) / batch.size if student.mim else 0.0)
    kept = [float((drops[..., place] >= rate).float().mean()) for place, rate in enumerate(student.backbone.drops[:-2])]
    sizes = sizes._replace(blocks=sum(kept) / 2)  # as drawn, instead of as expected
    parts = Parts(student, batch)
    with FlopCounterMode(display=False) as counter:
        parts.step()
    ours = batch.size * sum(cost.step_flops(sizes, head).values())
    # torch does not count a product into a tensor that is there: one of the three of the MIM term
    missed = 2 * len(batch.masked) * head.bottleneck_dim * head.out_dim if student.mim else 0
    assert counter.get_total_flops() == pytest.approx(ours - missed, rel=0.01)


def test_stochastic_depth_is_expected_to_skip_its_rate():
    student = built(drop_path=0.4, depth=5)  # rates 0, 0.1, 0.2, 0.3 and 0.4 in the last block, which does not skip
    assert cost.sizes(student.backbone, VIEWS, MasksConfig(), True, CPU).blocks == pytest.approx(4 - 0.6)
    student.backbone.skips_samples = False  # as when it is compiled
    assert cost.sizes(student.backbone, VIEWS, MasksConfig(), True, CPU).blocks == 4


@pytest.mark.parametrize("half", [True, False], ids=["bf16", "float32"])
@pytest.mark.parametrize("case", ["MIM", "DINO only", "a stem of convolutions"])
def test_activations_are_what_autograd_keeps(make_batch, case, half):
    given = {"embed_dim": 128, "num_heads": 2, **CASES[case]}
    student, batch = built(**given), make_batch(8, masks={"ratios": (0.3,), "spreads": (0.2,)})
    if student.backbone.grid != (8, 4):
        batch = Batch(**{**vars(batch), "masks": batch.masks[:, :, ::2, ::2], "masked": torch.arange(20)})
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in student.parameters()}
    shapes = {tuple(parameter.shape) for parameter in student.parameters()}
    shapes |= {shape[::-1] for shape in shapes}  # of their copies in 16 bits

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tuple(tensor.shape) not in shapes:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):  # noqa: SIM117 - one is the subject
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            guessed = student(batch)
    assert guessed.cls.requires_grad
    sizes = cost.sizes(student.backbone, VIEWS, MasksConfig(), student.mim, CPU)
    sizes = sizes._replace(masked=len(batch.masked) / batch.size if student.mim else 0.0)
    pixels = 2 * sizes.pixels[0] + sizes.locals * sizes.pixels[1]
    not_autograds = pixels * 3 * (5 if half else 1)  # the bytes as they came, and in float32 beside the 16 bits
    ours = batch.size * (sum(cost.saved_bytes(sizes, HEAD, half, fused=False).values()) - not_autograds)
    assert sum(kept.values()) == pytest.approx(ours, rel=0.12)


def test_a_state_on_disk_has_the_bytes_that_were_told(tmp_path):
    student = built()
    modules = {"student": student, "teacher": build_teacher(student), "centres": nn.ModuleDict()}
    optimizer = optim.build_optimizer(student, OptimConfig())
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    checkpoint.save_state(tmp_path, modules, (modules["student"], [optimizer]), 0, keep=1)
    (file,) = tmp_path.glob("*/*.safetensors")
    told = cost.state_bytes(modules)
    assert told < file.stat().st_size < told + 40_000  # safetensors' header, a line for each tensor


MEASURE = """
import resource, sys
from pathlib import Path

import torch

sys.path[:0] = [{root!r}, {tests!r}]
import test_cost as t

batch = t.noise(size=4, places=6)
x = torch.rand(64, 64, requires_grad=True)
(x @ x).sum().backward()
before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
t.HEAD = t.HeadsConfig()
student = t.built(views=t.ViewsConfig(), head=t.HEAD, patch_size=16, embed_dim=384, num_heads=6, depth=3)
parts, optimizer = t.Parts(student, batch), t.optim.build_optimizer(student, t.OptimConfig())
for _ in range(2):
    parts.step(half=True)
    optimizer.step()
    optimizer.zero_grad()
sizes = t.cost.sizes(student.backbone, t.ViewsConfig(), t.MasksConfig(), True, t.CPU)
counts = tuple(sum(p.numel() for p in part.parameters()) for part in (student, parts.teacher))
told = sum(t.cost.step_memory(sizes, t.HEAD, counts, batch.size, half=True, gpu=False).values())
# not ru_maxrss, which begins with what the parent had
peak = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())["VmHWM"]
print(told, int(peak.split()[0]) * 1024 - before)
"""


def noise(size: int, places: int) -> Batch:
    """A batch of noise at the published sizes; 15 % of the patches are masked. places: of drop path."""
    v, generator = ViewsConfig(), torch.Generator().manual_seed(0)
    masks = torch.rand(2, size, 16, 8, generator=generator) < 0.145
    masked = masks.flatten().nonzero().squeeze(1)

    def pixels(count: int, shape: tuple[int, int]) -> torch.Tensor:
        return torch.randint(256, (count, size, *shape, 3), dtype=torch.uint8, generator=generator)

    return Batch(
        rows=torch.arange(size),
        replaced=torch.full((size,), -1),
        global_crops=pixels(2, v.global_size),
        local_crops=pixels(v.local_count, v.local_size),
        boxes=torch.zeros(2 + v.local_count, size, 5, dtype=torch.int64),
        masks=masks,
        masked=masked,
        mask_weights=torch.full((len(masked),), 0.05),
        global_drops=torch.ones(2, size, places),
        local_drops=torch.ones(v.local_count, size, places),
    )


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
def test_memory_is_about_what_a_process_grows_by():
    # an estimate: a C allocator keeps some of what it got back, and how much depends on its version
    program = MEASURE.format(root=str(small.ROOT), tests=str(small.ROOT / "tests"))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=small.environment())
    assert done.returncode == 0, done.stderr
    told, grown = map(float, done.stdout.split())
    assert 0.7 < told / grown < 1.4


def test_more_images_bytes_and_prototypes_take_more_memory():
    sizes = cost.sizes(built().backbone, VIEWS, MasksConfig(), True, CUDA)

    def bytes_of(images: int, half: bool = True, **head) -> float:
        config = HEAD.model_copy(update=head)
        return sum(cost.step_memory(sizes, config, (10**6, 10**6), images, half, gpu=True).values())

    assert bytes_of(64) > bytes_of(32)
    assert bytes_of(64, half=False) > bytes_of(64)
    assert bytes_of(64, out_dim=128) > bytes_of(64)
