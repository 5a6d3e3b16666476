"""The plan: its numbers against a real run, its times by hand, what it warns of; that telling it leaves no trace."""

import functools
from pathlib import Path

import numpy as np
import pytest
import small
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pretrain import hardware, planning
from pretrain.backbone import Backbone, BackboneConfig, timm_arguments
from pretrain.config import PretrainConfig
from pretrain.heads import Head, HeadsConfig
from pretrain.photometric import PhotometricConfig
from pretrain.schedules import at
from pretrain.student_teacher import Student, build_teacher
from recipes.errors import UserError
from recipes.load import load
from shards.packed import PackedSplit
from shards.reader import ShardReader

PAPER, LUPERSON = "pretrain/personvit_vits16_luperson.yaml", 4_180_243


class Images:
    """As much of a reader as a plan asks for."""

    def __init__(self, count: int, shards: list[int] | None = None):
        self.count, self.remote, self.parts = count, shards is not None, []
        if shards is not None:
            part = PackedSplit.__new__(PackedSplit)
            part.tars = [("s3://somewhere/a.tar", size, 0) for size in shards]
            self.parts = [part]

    def __len__(self) -> int:
        return self.count


@functools.cache
def networks(config: BackboneConfig, size: tuple[int, int], head: HeadsConfig, mim: bool) -> dict[str, nn.Module]:
    """Student and teacher without weights."""
    with torch.device("meta"):
        backbone = Backbone(timm_arguments(config, size), masked=mim, drop_path=config.drop_path)
        student = Student(backbone, Head(backbone.dim, head, mim), PhotometricConfig(), mim)
        return {"student": student, "teacher": build_teacher(student), "centres": nn.ModuleDict()}


def planned(*overrides: str, recipe: str = PAPER, processes: int = 1, reader: Images | None = None) -> planning.Plan:
    """The plan of a recipe with overrides, for this machine's CPU unless they say otherwise."""
    config = load(PretrainConfig, recipe, overrides)
    modules = networks(config.backbone, config.views.global_size, config.heads, config.losses.patch_weight > 0)
    launched = (processes, torch.device("cpu"))
    return planning.plan(config, modules, reader or Images(LUPERSON), launched, Path("runs/x"), "random weights")


def notes(plan: planning.Plan) -> str:
    return "\n".join(line for line in plan.lines if line.startswith("note: "))


def line(plan: planning.Plan, start: str) -> str:
    (found,) = [line for line in plan.lines if line.startswith(start)]
    return found


@pytest.fixture(scope="module")
def crops(tmp_path_factory) -> Path:
    return small.drawn(tmp_path_factory.mktemp("planning"), small.UNLABELED)


# 12 steps; states after 4, 8 and 12, of which two stay, teachers after 4, 8 and 12
LENGTH = ["schedules.epochs=1.5", "checkpoint.every_epochs=0.5", "checkpoint.teacher_every_epochs=0.5", "precision=no"]
LENGTH += ["pictures.images=0"]  # how many bytes a PNG takes hangs on what it shows


def test_a_dry_run_tells_the_plan_and_leaves_nothing(crops, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(crops.iterdir())
    assert small.run(small.arguments("pretrain/run.py", tmp_path / "out", crops, *LENGTH, "dry_run=true")) == 0
    told = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert sorted(crops.iterdir()) == before
    assert "128 images, 12 steps of 16 = 1.50 epochs; 1 process(es) x 1 micro-batch(es) x 16 images" in told
    for start in (
        "parameters: vit_tiny",
        "work: ",
        "time: ",
        "memory: ",
        "loader: ",
        "disk: ",
        "data: 3 shard(s)",
        "schedule: ",
    ):
        assert f"\n{start}" in f"\n{told}", f"the plan does not tell {start!r}"


def test_the_plan_is_what_a_run_then_does(crops, tmp_path, capsys):
    config = load(PretrainConfig, "pretrain/smoke.yaml", [f"loader.shards=[{crops}]", *small.PRETRAIN, *LENGTH])
    plan = planned(
        *(f"loader.shards=[{crops}]", *small.PRETRAIN, *LENGTH),
        recipe="pretrain/smoke.yaml",
        reader=ShardReader([crops], config.loader.splits),
    )
    out = tmp_path / "run"
    with FlopCounterMode(display=False) as counter:
        assert small.run(small.arguments("pretrain/run.py", out, crops, *LENGTH)) == 0
    told, lines = capsys.readouterr().out, small.metrics(out)
    assert line(plan, "parameters: ") in told
    assert "schedule: " not in told, "a run tells the short form"
    assert "loader: " not in told, "a run tells the short form"
    assert (len(lines), lines[-1]["samples"]) == (plan.steps, plan.steps * 16) == (12, 192)
    state = load_file(max((out / "checkpoints").iterdir()) / "tensors.safetensors")
    held = {name: tensor for name, tensor in state.items() if name.startswith("student.")}
    fixed = held.pop("student.head.last_layer.weight_g")  # a buffer: norm_last_layer
    assert sum(plan.parameters.values()) == sum(tensor.numel() for tensor in held.values())
    assert len(fixed) == 64
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert plan.disk == pytest.approx(size, rel=0.05)
    # what watches over the run costs a little on such a network, and torch misses a product of the MIM term
    assert counter.get_total_flops() / (12 * 16) == pytest.approx(plan.flops_per_image, rel=0.05)


def test_pictures_take_room_too(crops, tmp_path):
    given = [*small.PRETRAIN, *LENGTH, "pictures.images=4", "checkpoint.teacher_every_epochs=1"]
    named = {"recipe": "pretrain/smoke.yaml", "reader": ShardReader([crops], "unlabeled")}
    plans = [planned(f"loader.shards=[{crops}]", *given, *more, **named) for more in ([], ["pictures.images=0"])]
    out = tmp_path / "run"
    assert small.run(small.arguments("pretrain/run.py", out, crops, *given)) == 0
    pictures = sum(path.stat().st_size for path in out.glob("pictures/*/*.png"))
    assert pictures < plans[0].disk - plans[1].disk < 6 * pictures, "twice, for TensorBoard has them too, or more"


def test_time_is_work_by_rate():
    plan = planned("dry_run=true", "planning.gpu=a100", "planning.gpus=8", "planning.days=2")
    assert plan.steps == 1_224_680 == int(300 * LUPERSON / 1024)
    slow, fast = (8 * share * 312e12 / plan.flops_per_image for share in (0.25, 0.40))
    hours = [plan.steps * 1024 / rate / 3600 for rate in (fast, slow)]
    assert f"time: {hours[0]:.1f} hours to {hours[1]:.1f} hours on 8 x A100" in str(plan)
    assert f"{slow:,.0f} to {fast:,.0f} images/s" in str(plan)
    assert f"{plan.steps * 1024 / 2 / 86400:,.0f} images/s" in line(plan, "  to be done in 2 days")
    # 2 x 256 x 128 + 6 x 96 x 64 = 102,400 numbers an image, at 105 million a second
    assert f"{slow * 8:,.0f} to {fast * 8:,.0f} views/s take {slow / 1025.4:.1f}" in line(plan, "loader: ")
    assert "learning rate up until step 40,823" in line(plan, "schedule: ")
    assert "0.04 to 0.07, reached at step 118,386" in line(plan, "  teacher temperature")
    assert plan.peak is None, "the CPU of this run has no known peak"


def test_the_hours_of_a_recipe_do_not_depend_on_the_images_that_are_here():
    here = planned("dry_run=true", "planning.gpu=a100", f"planning.images={LUPERSON}", reader=Images(128))
    assert here.lines[1:4] == planned("dry_run=true", "planning.gpu=a100").lines[1:4]
    assert f"{LUPERSON:,} images" in here.lines[1]


@pytest.mark.parametrize("processes", [1, 8, 64])
def test_more_devices_change_the_layout_only(processes):
    one, many = planned(), planned(processes=processes)
    assert (many.steps, many.flops, many.steps_per_epoch) == (one.steps, one.flops, one.steps_per_epoch)
    assert f"{processes} process(es) x " in many.lines[1]
    assert many.lines[1].endswith("peak learning rate 2.00e-03")
    assert many.micro == min(128, 1024 // processes)


def test_a_step_that_does_not_fit_gets_a_micro_batch_that_does():
    plan = planned("dry_run=true", "planning.gpu=l4", "planning.gpu_memory=10")
    assert "loader.batch_per_device=64" in notes(plan)
    fitting = planned("dry_run=true", "planning.gpu=l4", "planning.gpu_memory=10", "loader.batch_per_device=64")
    assert sum(fitting.memory.values()) < 0.9 * 10e9 < sum(plan.memory.values())
    assert "memory" not in notes(fitting)
    assert "smaller model" in notes(planned("dry_run=true", "planning.gpu=l4", "planning.gpu_memory=1"))


# what is given, what the plan then says; without it the plan says nothing
WARNINGS = {
    "learning rate": (["loader.batch=2048", "schedules.warmup_epochs=20"], "the linear rule gives 4.00e-03"),
    "batch": (["loader.batch=2048"], "above a global batch of 1024"),
    "sinkhorn": (["centering.kind=sinkhorn"], "Sinkhorn-Knopp see one micro-batch"),
    "koleo": (["losses.koleo_weight=0.1"], "KoLeo see one micro-batch"),
    "stem": (["backbone.stem=ics"], "batch normalisation (ICS) see one micro-batch"),
    "bf16": (["planning.gpu=v100"], "a V100 multiplies no bf16"),
    "workers": (["loader.workers=1", "planning.gpu=h100"], "loader.workers=4 or more"),
}


@pytest.mark.parametrize("given, said", WARNINGS.values(), ids=list(WARNINGS))
def test_what_is_easily_overlooked_is_said(given, said):
    hardware_given = [item for item in given if item.startswith("planning.")]
    dry = ["dry_run=true", *hardware_given] if hardware_given else []
    assert said in notes(planned(*dry, *given))
    other = ["precision=no"] if "bf16" in said else []
    assert said not in notes(planned(*dry, *other))


def test_sinkhorn_on_whole_shares_does_not_depend_on_the_devices():
    assert "Sinkhorn" not in notes(planned("centering.kind=sinkhorn", processes=8))


def test_a_full_disk_and_a_narrow_cache_are_said(monkeypatch):
    far = Images(LUPERSON, shards=[50_000_000, 10])  # 192 lanes, each in a shard of up to 50 MB
    assert notes(planned(reader=far)) == ""
    told = notes(planned("cache.gigabytes=5", reader=far))
    assert "reads from shards of 9.6 GB at a time and cache.gigabytes is 5" in told
    monkeypatch.setattr(planning, "free_bytes", lambda folder: 10**9)
    assert "runs/x has too little room" in notes(planned())


@pytest.mark.parametrize(
    "given, message",
    [
        (["planning.gpu=a100"], "it needs dry_run=true"),
        (["dry_run=true", "planning.gpus=8"], "need a card, for example planning.gpu=a100"),
        (["dry_run=true", "planning.gpu=gtx 10"], "'gtx 10' is not known; known are: b200"),
        (["dry_run=true", "planning.gpu=a100", "planning.gpus=7"], "7 processes do not divide the global batch"),
    ],
)
def test_a_plan_that_cannot_be_made_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        planned(*given)


# as torch.cuda.get_device_name gives them
NAMES = {
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835,
    "NVIDIA H200": 989,
    "NVIDIA L40S": 362,
    "NVIDIA L40": 181,
    "NVIDIA L4": 121,
    "NVIDIA A10": 125,
    "NVIDIA A10G": 70,
    "NVIDIA GeForce RTX 3090": 71,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA RTX 6000 Ada Generation": 364,
    "Tesla V100-SXM2-16GB": 125,
    "RTX4090": 165.2,
    "NVIDIA GeForce RTX 4090 Laptop GPU": None,
    "NVIDIA GeForce RTX 3090 Ti": None,
    "Quadro RTX 6000": None,
    "NVIDIA GeForce GTX 1080 Ti": None,
}


@pytest.mark.parametrize("name, tflops", NAMES.items(), ids=list(NAMES))
def test_a_card_is_known_by_its_name(name, tflops):
    assert hardware.peak_flops(name) == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_the_rate_of_a_cpu_is_measured_in_a_moment():
    rates = [hardware.matrix_rate(torch.float32, size=size) for size in (256, 512)]
    assert all(1e8 < rate < 1e14 for rate in rates)
    assert np.divide(*rates) == pytest.approx(1, abs=0.9), "products of both sizes run at about one rate"


def test_the_loader_is_taken_to_be_as_fast_as_it_was_measured():
    config = load(PretrainConfig, PAPER).views  # docs/results.md: 1,026 images/s with 6 local crops, 917 with 8
    assert hardware.images_a_core(config) == pytest.approx(1026, rel=0.01)
    assert hardware.images_a_core(config.model_copy(update={"local_count": 8})) == pytest.approx(917, rel=0.01)
    assert hardware.images_a_core(config.model_copy(update={"backend": "pil", "local_count": 8})) == pytest.approx(
        1000 / 9.4, rel=0.01
    )


def test_the_steps_of_the_schedule_are_those_of_the_run():
    # the steps that test_time_is_work_by_rate reads in the plan
    config, per_epoch = load(PretrainConfig, PAPER).schedules, LUPERSON / 1024
    steps = (4_081, 4_083, 40_822, 40_823, 118_385, 118_386)
    now = {step: at(step, 1_224_680, per_epoch, 1024, config) for step in steps}
    assert (now[4_081].freeze_last_layer, now[4_083].freeze_last_layer) == (True, False)
    assert now[40_822].lr < now[40_823].lr == pytest.approx(2e-3, rel=1e-6)
    assert now[118_385].teacher_temperature < now[118_386].teacher_temperature == pytest.approx(0.07)
