"""The convolutional stem: counts and names as published, its layers by hand, whose statistics normalise what."""

import copy
import multiprocessing

import pytest
import small
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.layers import PatchEmbed
from torch import Tensor, nn

from pretrain.backbone import Backbone, BackboneConfig, timm_arguments
from pretrain.checkpoint import load_backbone, save_teacher
from pretrain.optim import OptimConfig, build_optimizer
from pretrain.stem import IBN, ICSStem, batch_norms, synchronised, train_norms
from recipes.errors import UserError

# of a ViT/16 at 256 x 128, and how many more parameters the stem has than the convolution of the patches
SIZES = [("vit_small_patch16_224", 384, 21_639_552, 1_361_472), ("vit_base_patch16_224", 768, 85_746_432, 2_639_424)]
TINY = BackboneConfig(name="vit_tiny_patch16_224", embed_dim=32, depth=2, num_heads=2, stem="ics")
NORMS = ("conv.1.IN", "conv.1.BN", "conv.4.IN", "conv.4.BN", "conv.7")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def stem() -> ICSStem:
    """A stem for 64 x 32 pixels and D = 24 whose norms scale and shift each channel in its own way."""
    torch.manual_seed(0)
    stem = ICSStem((64, 32), 16, 24)
    with torch.no_grad():
        for name in NORMS:
            stem.get_parameter(f"{name}.weight").uniform_(0.5, 1.5)
            stem.get_parameter(f"{name}.bias").uniform_(-0.5, 0.5)
    return stem


@pytest.mark.parametrize("name, dim, plain, more", SIZES)
def test_parameters_are_counted_as_published(name, dim, plain, more):
    with torch.device("meta"):
        stem, convolution = ICSStem((256, 128), 16, dim), PatchEmbed((256, 128), 16, embed_dim=dim)
        backbone = Backbone(timm_arguments(BackboneConfig(name=name, stem="ics"), (256, 128)))
    counts = [sum(p.numel() for p in part.parameters()) for part in (stem, convolution, backbone)]
    assert counts[0] - counts[1] == more
    assert counts[2] == plain + more


@torch.no_grad()
@pytest.mark.parametrize("size, grid", [((256, 128), (16, 8)), ((96, 64), (6, 4)), ((384, 128), (24, 8))])
def test_tokens_lie_as_those_of_the_patch_convolution(size, grid):
    stem = ICSStem((256, 128), 16, 24)
    convolution = PatchEmbed((256, 128), 16, embed_dim=24, output_fmt="NHWC", strict_img_size=False)
    images = torch.zeros(2, 3, *size)
    assert stem(images).shape == convolution(images).shape == (2, *grid, 24)
    for name in ("img_size", "grid_size", "num_patches", "patch_size", "flatten", "output_fmt"):
        assert getattr(stem, name) == getattr(convolution, name), name
    assert stem.dynamic_feat_size(size) == convolution.dynamic_feat_size(size) == grid
    assert stem.feat_ratio() == convolution.feat_ratio() == 16
    stem.set_input_size(img_size=size)
    assert (stem.img_size, stem.grid_size, stem.num_patches) == (size, grid, grid[0] * grid[1])


def test_names_are_those_of_the_published_checkpoints():
    affine, running = ("weight", "bias"), ("running_mean", "running_var", "num_batches_tracked")
    expected = {f"conv.{place}.weight" for place in (0, 3, 6)} | {"proj.weight", "proj.bias"}
    expected |= {f"{name}.{what}" for name in NORMS for what in affine}
    expected |= {f"{name}.{what}" for name in NORMS if not name.endswith("IN") for what in running}
    assert set(ICSStem((64, 32), 16, 24).state_dict()) == expected


def normalised(x: Tensor, over: tuple[int, ...], norm: nn.Module) -> Tensor:
    """(x - mean) / sqrt(var + 1e-5), then scale and shift of the channels; mean and variance over these dimensions."""
    mean, variance = x.mean(over, keepdim=True), x.var(over, keepdim=True, correction=0)
    shape = (1, -1, 1, 1)
    return (x - mean) / (variance + 1e-5).sqrt() * norm.weight.view(shape) + norm.bias.view(shape)


def halves(x: Tensor, ibn: IBN) -> Tensor:
    """32 channels normalised over each image, 32 over the batch."""
    return torch.cat([normalised(x[:, :32], (2, 3), ibn.IN), normalised(x[:, 32:], (0, 2, 3), ibn.BN)], dim=1)


@torch.no_grad()
def test_layers_by_hand(stem):
    stem, images = stem.double(), noise(3, 3, 64, 32).double()
    conv = stem.conv
    x = F.relu(halves(F.conv2d(images, conv[0].weight, None, stride=2, padding=3), conv[1]))
    assert x.shape == (3, 64, 32, 16)
    x = F.relu(halves(F.conv2d(x, conv[3].weight, None, padding=1), conv[4]))
    x = F.relu(normalised(F.conv2d(x, conv[6].weight, None, padding=1), (0, 2, 3), conv[7]))
    patches = x.unfold(2, 8, 8).unfold(3, 8, 8)  # [B, C, 4, 2, 8, 8]
    expected = torch.einsum("bcrsij,dcij->brsd", patches, stem.proj.weight) + stem.proj.bias
    assert torch.allclose(stem(images), expected, atol=1e-10)
    assert conv[7].running_mean.abs().max() > 0.01


@torch.no_grad()
def test_one_half_sees_its_image_and_the_other_the_batch():
    ibn, x = IBN(8), noise(3, 8, 5, 4)
    other = x.clone()
    other[2] = 3 * noise(8, 5, 4, seed=1) + 2
    before, after = ibn(x)[0], ibn(other)[0]
    assert torch.equal(before[:4], after[:4])
    assert (before[4:] - after[4:]).abs().amax((1, 2)).min() > 0.1, "every channel of this half"
    ibn.eval()
    assert torch.equal(ibn(x)[0], ibn(other)[0]), "by running statistics an image does not see the others"


def test_every_parameter_learns(stem):
    stem(noise(4, 3, 64, 32)).square().sum().backward()
    for name, parameter in stem.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
        assert torch.isfinite(parameter.grad).all(), name


def test_in_bf16_it_is_finite_and_close(stem):
    images = noise(4, 3, 64, 32)
    exact = stem(images)
    with torch.autocast("cpu", torch.bfloat16):
        found = stem(images)
    assert found.dtype == torch.bfloat16
    assert torch.isfinite(found).all()
    assert (found.float() - exact).norm() < 0.03 * exact.norm()
    found.float().square().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in stem.parameters())


@pytest.mark.parametrize("patch", [8, 14, 32])
def test_other_patches_are_refused(patch):
    with pytest.raises(UserError, match=rf"not of backbone\.patch_size = {patch}; set backbone\.patch_size=16"):
        ICSStem((256, 128), patch, 24)


def test_norms_are_not_decayed_and_convolutions_are():
    stem = ICSStem((64, 32), 16, 24)
    names = {parameter: name for name, parameter in stem.named_parameters()}
    decay, plain = ({names[p] for p in group["params"]} for group in build_optimizer(stem, OptimConfig()).param_groups)
    assert decay == {"conv.0.weight", "conv.3.weight", "conv.6.weight", "proj.weight"}
    assert plain == {f"{name}.{what}" for name in NORMS for what in ("weight", "bias")} | {"proj.bias"}


def test_several_processes_need_gpus():
    backbone = Backbone(timm_arguments(TINY, (64, 32)))
    with pytest.raises(UserError, match=r"backbone\.stem = ics .* all 2 processes.* not on cpu; start one process"):
        synchronised(backbone, 2, "cpu")
    assert synchronised(backbone, 1, "cpu") is backbone
    assert not [norm for norm in batch_norms(backbone) if isinstance(norm, nn.SyncBatchNorm)]
    plain = Backbone(timm_arguments(TINY.model_copy(update={"stem": "patch"}), (64, 32)))
    assert synchronised(plain, 2, "cpu") is plain, "a ViT without the stem has nothing to join"


def test_only_batch_norms_are_joined_and_tensors_stay(stem):
    # converting needs no GPU, running does
    before = {name: value.data_ptr() for name, value in stem.state_dict().items()}
    joined = synchronised(stem, 2, "cuda")
    kinds = {name: type(part) for name, part in joined.named_modules() if name in NORMS}
    sync, instance = nn.SyncBatchNorm, nn.InstanceNorm2d
    assert kinds == dict(zip(NORMS, (instance, sync, instance, sync, sync), strict=True))
    assert {name: value.data_ptr() for name, value in joined.state_dict().items()} == before
    assert len(batch_norms(joined)) == 3


@torch.no_grad()
def test_a_teacher_in_eval_mode_normalises_by_the_batch(stem):
    teacher = nn.Sequential(copy.deepcopy(stem), nn.Dropout(0.9), nn.BatchNorm2d(4)).eval()
    images = 5 + 2 * noise(4, 3, 64, 32)
    assert not torch.allclose(teacher[0](images), stem(images), atol=0.1), "its running statistics are still 0 and 1"
    train_norms(teacher)
    assert [part.training for part in (teacher, teacher[0], teacher[1], teacher[2])] == [False, False, False, True]
    assert torch.equal(teacher[0](images), stem(images))
    for _ in range(100):  # 0.9^100 of the start is left
        teacher[0](images)
    teacher.eval()
    # torch notes the variance with B H W - 1 in the denominator; of 4 x 32 x 16 values that is 1/4000 of a deviation
    assert torch.allclose(teacher[0](images), stem(images), atol=5e-3)


def _join(rank: int, folder: str, answers) -> None:
    """One of two processes on one GPU: its half of a batch, the images of unequal brightness."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    stem = synchronised(ICSStem((64, 32), 16, 24), 2, "cuda").cuda()
    tokens = stem((noise(6, 3, 64, 32) + torch.arange(6.0).view(6, 1, 1, 1))[3 * rank : 3 * rank + 3].cuda())
    answers.put((rank, tokens.detach().cpu().numpy(), stem.conv[7].running_mean.cpu().numpy()))
    dist.destroy_process_group()


@torch.no_grad()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="batch statistics over processes need a GPU")
def test_two_processes_normalise_as_one(tmp_path):
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    children = [context.Process(target=_join, args=(rank, str(tmp_path), answers), daemon=True) for rank in range(2)]
    for child in children:
        child.start()
    found = sorted((answers.get(timeout=120) for _ in children), key=lambda answer: answer[0])
    torch.manual_seed(0)
    stem = ICSStem((64, 32), 16, 24).cuda()
    tokens = stem((noise(6, 3, 64, 32) + torch.arange(6.0).view(6, 1, 1, 1)).cuda()).cpu()
    halves = torch.cat([torch.from_numpy(tokens_of_rank) for _, tokens_of_rank, _ in found])
    # without joining the two differ by a third; convolutions in TF32 by a thousandth
    assert (halves - tokens).norm() < 0.01 * tokens.norm()
    for _, _, mean in found:
        assert torch.allclose(torch.from_numpy(mean), stem.conv[7].running_mean.cpu(), atol=1e-3)


@torch.no_grad()
def test_an_exported_teacher_with_the_stem_is_loaded_again(tmp_path):
    torch.manual_seed(0)
    backbone = Backbone(timm_arguments(TINY, (64, 32)))
    backbone.initialise("truncated_normal")
    assert isinstance(backbone.vit.patch_embed, ICSStem)
    images = noise(3, 3, 64, 32)
    backbone(images)  # in train mode, so that there are running statistics to lose
    save_teacher(tmp_path, backbone, {})
    found, _ = load_backbone(tmp_path)
    assert torch.equal(found.eval()(images).cls, backbone.eval()(images).cls)
    larger, _ = load_backbone(tmp_path, timm_arguments(TINY, (96, 48)))
    assert larger(noise(2, 3, 96, 48)).patches.shape == (2, 18, 32)


@pytest.mark.parametrize("given", ["backbone.stem=ics", "backbone.registers=4"])
def test_a_pretraining_with_it_learns_exports_and_loads(given, tmp_path):
    crops = small.drawn(tmp_path, small.UNLABELED)
    command = small.arguments("pretrain/run.py", tmp_path / "run", crops, given, "backbone.patch_size=16")
    assert small.run([*command, "schedules.epochs=3", "views.local_count=1"]) == 0
    losses = [line["loss"] for line in small.metrics(tmp_path / "run")]
    assert len(losses) == 3 * 8
    assert sum(losses[16:]) / 8 < sum(losses[:8]) / 8 - 0.1, "the same images, two epochs later"
    teacher = tmp_path / "run" / "teacher"
    backbone, _ = load_backbone(teacher)
    images = noise(3, 3, 64, 32)
    tokens = backbone.eval()(images)
    assert tokens.cls.shape == (3, 32)
    assert tokens.patches.shape == (3, 8, 32), "4 x 2 patches; registers are none of them"
    weights = load_file(teacher / "model.safetensors")
    if given == "backbone.stem=ics":
        assert weights["patch_embed.conv.7.num_batches_tracked"] == len(losses), "one batch of clean views a step"
        assert weights["patch_embed.conv.7.running_var"].sub(1).abs().max() > 0.1
    else:
        assert weights["reg_token"].shape == (1, 4, 32)
        arguments = small.json_of(teacher / "config.json")["timm"]
        plain = timm.create_model(arguments.pop("model_name"), **arguments).eval()
        plain.load_state_dict(weights, strict=True)
        expected = plain.forward_features(images)
        assert torch.allclose(tokens.cls, expected[:, 0], atol=1e-5)
        assert torch.allclose(tokens.patches, expected[:, 5:], atol=1e-5)
