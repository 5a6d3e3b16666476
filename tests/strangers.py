"""Files as other projects write them, with drawn numbers: the names of their keys, spelled out one by one."""

import argparse
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

DIM, DEPTH, K, BOTTLENECK, HIDDEN = 64, 2, 32, 16, 24
SQUARE, TALL = (14, 14), (16, 8)
IBOT_ARGS = {
    **{"arch": "vit_small", "patch_size": 16, "out_dim": K, "patch_out_dim": K, "shared_head": True},
    **{"shared_head_teacher": True, "norm_last_layer": False, "momentum_teacher": 0.99, "norm_in_head": None},
    **{"act_in_head": "gelu", "use_masked_im_modeling": True, "pred_ratio": [0.0, 0.3], "pred_ratio_var": [0.0, 0.2]},
    **{"pred_shape": "block", "pred_start_epoch": 0, "lambda1": 1.0, "lambda2": 0.5, "warmup_teacher_temp": 0.03},
    **{"teacher_temp": 0.06, "warmup_teacher_patch_temp": 0.03, "teacher_patch_temp": 0.06},
    **{"warmup_teacher_temp_epochs": 20, "use_fp16": True, "weight_decay": 0.05, "weight_decay_end": 0.3},
    **{"clip_grad": 0.3, "batch_size_per_gpu": 64, "epochs": 250, "freeze_last_layer": 3, "lr": 7.5e-4},
    **{"warmup_epochs": 12, "min_lr": 2e-6, "optimizer": "adamw", "load_from": None, "drop_path": 0.2},
    **{"global_crops_number": 2, "global_crops_scale": (0.4, 1.0), "local_crops_number": 7},
    **{"local_crops_scale": (0.05, 0.8), "data_path": "images", "output_dir": "out", "saveckp_freq": 20, "seed": 4},
    **{"num_workers": 9, "dist_url": "env://", "local_rank": 0, "world_size": 8, "rank": 0, "gpu": 0},
}


class Stranger(NamedTuple):
    """A file and what has to come out of it."""

    content: Any
    backbone: dict[str, Tensor]  # by timm's names
    left_out: set[str]  # keys of its state dict
    style: str  # a part of the style's name


def drawn(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Tensors of those shapes."""
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=rng) * 0.05 for name, shape in shapes.items()}


def backbone(grid=SQUARE, seed: int = 0, patch: int = 16, dim: int = DIM, scale: bool = False, ics: bool = False):
    """A ViT by timm's names: `blocks.<n>` with norm1, attn.qkv, attn.proj, norm2, mlp.fc1, mlp.fc2."""
    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, 1 + grid[0] * grid[1], dim), "patch_embed.proj.bias": (dim,)}
    shapes["patch_embed.proj.weight"] = (dim, 64, patch // 2, patch // 2) if ics else (dim, 3, patch, patch)
    for n in range(DEPTH):
        layers = {"norm1": (dim,), "attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim), "norm2": (dim,)}
        for layer, shape in {**layers, "mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}.items():
            shapes |= {f"blocks.{n}.{layer}.weight": shape, f"blocks.{n}.{layer}.bias": shape[:1]}
        shapes |= {f"blocks.{n}.ls{i}.gamma": (dim,) for i in (1, 2)} if scale else {}
    shapes |= {"norm.weight": (dim,), "norm.bias": (dim,)}
    counters = {}
    if ics:
        stem = {"conv.0.weight": (64, 3, 7, 7), "conv.3.weight": (64, 64, 3, 3), "conv.6.weight": (64, 64, 3, 3)}
        for norm, width in (("1.IN", 32), ("1.BN", 32), ("4.IN", 32), ("4.BN", 32), ("7", 64)):
            stem |= {f"conv.{norm}.weight": (width,), f"conv.{norm}.bias": (width,)}
            if not norm.endswith("IN"):
                stem |= {f"conv.{norm}.running_mean": (width,), f"conv.{norm}.running_var": (width,)}
                counters[f"patch_embed.conv.{norm}.num_batches_tracked"] = torch.tensor(7)
        shapes |= {f"patch_embed.{name}": shape for name, shape in stem.items()}
    return drawn(shapes, seed) | counters


def head(twice: bool, seed: int = 1, prototypes: int = K) -> dict[str, Tensor]:
    """A projection head of DINO; twice: with iBOT's second name of the same prototypes."""
    widths = ((0, HIDDEN, DIM), (2, HIDDEN, HIDDEN), (4, BOTTLENECK, HIDDEN))
    shapes = {
        f"mlp.{n}.{what}": (out, into)[:end] for n, out, into in widths for what, end in (("weight", 2), ("bias", 1))
    }
    found = drawn(
        shapes | {"last_layer.weight_g": (prototypes, 1), "last_layer.weight_v": (prototypes, BOTTLENECK)}, seed
    )
    again = {name.replace("last_layer", "last_layer2"): found[name] for name in found if "last_layer" in name}
    return found | (again if twice else {})


def put(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same under longer names."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def training(grid=SQUARE, ibot: bool = True, wrap: str = "", args: Any = None, ics: bool = False) -> Stranger:
    """A whole training file of DINO or iBOT: with the optimiser, and numbers of numpy as their schedules leave them."""
    own, heads = backbone(grid, ics=ics), head(twice=ibot)
    other = put("module.", put("backbone.", backbone(grid, seed=5, ics=ics)) | put("head.", head(ibot, seed=6)))
    other |= {"module.backbone.masked_embed": drawn({"m": (1, DIM)}, 7)["m"]} if ibot else {}
    centres = drawn({"center": (1, K), "center2": (1, 1, K)}, 8)
    group = {"lr": np.float64(1e-3), "weight_decay": np.float32(0.25), "params": [0]}
    content = {
        "student": other,
        "teacher": put(wrap, put("backbone.", own) | put("head.", heads)),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [group]},
        "epoch": 221,
        "args": args if args is not None else argparse.Namespace(**IBOT_ARGS),
        "ibot_loss" if ibot else "dino_loss": centres if ibot else {"center": centres["center"]},
        "fp16_scaler": {"scale": 1024.0, "growth_factor": 2.0, "_growth_tracker": 5},
    }
    return Stranger(content, own, set(put(f"{wrap}head.", heads)), "iBOT" if ibot else "DINO training file")


def pass_backbone(grid=TALL) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """PASS's keys, and what they are in timm: the part tokens are registers, whose positions follow that of CLS."""
    own = backbone(grid)
    parts = drawn({f"part_token{n}": (1, 1, DIM) for n in (1, 2, 3)}, 3)
    places = drawn({f"part{n}_pos": (1, 1, DIM) for n in (1, 2, 3)}, 13)
    cls, patches = own["pos_embed"][:, :1], own["pos_embed"][:, 1:]
    theirs = own | parts | places | {"cls_pos": cls, "pos_embed": patches}
    own["reg_token"] = torch.cat([parts[f"part_token{n}"] for n in (1, 2, 3)], dim=1)
    own["pos_embed"] = torch.cat([cls, *(places[f"part{n}_pos"] for n in (1, 2, 3)), patches], dim=1)
    return theirs, own


def chunked(tensors: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """DINOv2's names of blocks in chunks of `size`: blocks.<chunk>.<number of the block, counted through>."""
    found = {}
    for name, tensor in tensors.items():
        first, _, rest = name.partition(".")
        number = int(rest.partition(".")[0]) if first == "blocks" else 0
        found[f"blocks.{number // size}.{rest}" if first == "blocks" else name] = tensor
    return found


def strangers() -> dict[str, Stranger]:
    """One of each kind."""
    square, tall, scaled = backbone(), backbone(TALL), backbone((16, 16), patch=14, scale=True)
    mask = drawn({"mask_token": (1, DIM)}, 4)
    theirs, of_pass = pass_backbone()
    registers = drawn({"register_tokens": (1, 4, DIM)}, 9)
    # the gated MLP: two halves out of the first layer, one into the second
    gated = scaled | {name: t[:, : 2 * DIM].clone() for name, t in scaled.items() if name.endswith("fc2.weight")}
    with_scale = backbone(scale=True)
    places = with_scale["pos_embed"]
    longer = torch.cat([places[:, :1], torch.zeros(1, 4, DIM), places[:, 1:]], dim=1)
    four = {f"head.{part}.weight": torch.zeros(2, 2) for part in ("mlp_cls.0", "mlp_pt1.0", "last_layer_pt3")}
    v2_heads = put("dino_head.", head(False)) | put("ibot_head.", head(False, 2))
    neck = drawn({f"bottleneck.{part}": (DIM,) for part in ("weight", "bias", "running_mean", "running_var")}, 2)
    neck |= {"bottleneck.num_batches_tracked": torch.tensor(9), "classifier.weight": torch.zeros(751, DIM)}
    dead = {"base.fc.weight": torch.zeros(1000, DIM), "base.fc.bias": torch.zeros(1000)}
    classifier = {"head.weight": torch.zeros(10, DIM), "head.bias": torch.zeros(10)}
    msn = {f"fc.{name}.weight": torch.zeros(2, 2) for name in ("fc1", "bn1", "fc2", "fc3")}
    return {
        "DINO": training(ibot=False),
        "DINO backbone": Stranger(square, square, set(), "bare"),
        "iBOT": training(),
        "iBOT teacher": Stranger({"state_dict": square}, square, set(), "bare"),
        "PersonViT pretraining": training(TALL),
        "PersonViT": Stranger(put("base.", tall) | dead | neck, tall, {*dead, *neck}, "fine-tuned"),
        "DINOv2 training": Stranger(
            {"teacher": put("backbone.", chunked(scaled | mask, 1)) | v2_heads},
            *(scaled, {*v2_heads, "backbone.mask_token"}, "DINOv2 training file"),
        ),
        "DINOv2": Stranger(scaled | mask, scaled, {"mask_token"}, "DINOv2 backbone"),
        "DINOv2 in chunks": Stranger(chunked(scaled | mask, 2), scaled, {"mask_token"}, "DINOv2 backbone"),
        "DINOv2 giant": Stranger(
            {key.replace("fc1", "w12").replace("fc2", "w3"): tensor for key, tensor in (gated | mask).items()},
            *(gated, {"mask_token"}, "DINOv2 backbone"),
        ),
        "DINOv2 with registers": Stranger(
            with_scale | mask | registers,
            *(with_scale | {"reg_token": registers["register_tokens"], "pos_embed": longer}, {"mask_token"}, "DINOv2"),
        ),
        "TransReID-SSL": Stranger(tall, tall, set(), "bare"),
        "TransReID-SSL ICS": Stranger(ics := backbone(TALL, ics=True), ics, set(), "ICS"),
        "TransReID-SSL ICS training": training(TALL, ibot=False, wrap="module.", ics=True),
        "PASS": Stranger(theirs, of_pass, set(), "PASS backbone"),
        "PASS training": Stranger(
            {"teacher": put("backbone.", theirs) | four, "student": {}, "epoch": 3},
            *(of_pass, set(four), "PASS training file"),
        ),
        "MSN": Stranger({"target_encoder": put("module.", square | msn)}, square, {*put("module.", msn)}, "MSN"),
        "timm": Stranger(square | classifier, square, {*classifier}, "bare"),
        "wrapped three times": Stranger({"model": {"state_dict": {"module": square}}}, square, set(), "bare"),
        "compiled": Stranger({"model": put("_orig_mod.", square)}, square, set(), "bare"),
    }


def written(tmp_path, content, name: str = "file.pth") -> str:
    """The path of a file with that content."""
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in content.items()}, path)
    else:
        torch.save(content, path)
    return str(path)
