"""Files of models fine-tuned elsewhere, with drawn numbers: the names of their keys, spelled out one by one."""

from typing import Any, NamedTuple

import torch
from strangers import DEPTH, DIM, TALL, backbone, drawn, pass_backbone, put
from torch import Tensor

CLASSES = 7
SSL = "PersonViT, TransReID-SSL"


class Stranger(NamedTuple):
    """A file and what has to come out of it."""

    content: Any
    left_out: set[str]  # keys of its state dict
    made: set[str]  # names of the model that no key tells
    style: str


def norm(name: str, dim: int, seed: int = 0) -> dict[str, Tensor]:
    """A BatchNorm that has seen images."""
    rng = torch.Generator().manual_seed(seed + dim)
    own = {key: torch.randn(dim, generator=rng) for key in ("weight", "bias", "running_mean")}
    own |= {"weight": 1 + 0.3 * own["weight"], "running_var": 0.5 + torch.rand(dim, generator=rng)}
    return put(name, own | {"num_batches_tracked": torch.tensor(9)})


def classifier(name: str, dim: int) -> dict[str, Tensor]:
    """The weights of CLASSES identities."""
    return drawn({name: (CLASSES, dim)}, dim)


def resnet(prefix: str = "", ibn: bool = False) -> dict[str, Tensor]:
    """A ResNet-18 by torchvision's names; ibn: IBN-a in its first three stages."""
    shapes, norms = {"conv1.weight": (64, 3, 7, 7)}, {"bn1.": 64}
    into = 64
    for stage, width in enumerate((64, 128, 256, 512), start=1):
        for block in (0, 1):
            name = f"layer{stage}.{block}."
            shapes |= {f"{name}conv1.weight": (width, into, 3, 3), f"{name}conv2.weight": (width, width, 3, 3)}
            norms |= {f"{name}bn1.": width, f"{name}bn2.": width}
            if into != width:
                shapes |= {f"{name}downsample.0.weight": (width, into, 1, 1)}
                norms |= {f"{name}downsample.1.": width}
            into = width
    found = drawn(shapes, 2)
    for name, dim in norms.items():
        if ibn and name.startswith("layer") and name.endswith(".bn1.") and not name.startswith("layer4"):
            affine = {key: value for key, value in norm(f"{name}IN.", dim // 2).items() if key.endswith(("ght", "ias"))}
            found |= affine | norm(f"{name}BN.", dim // 2)
        else:
            found |= norm(name, dim)
    return put(prefix, found)


SWIN = {"embed_dim": 8, "depths": (2, 2, 4, 2), "num_heads": (1, 2, 2, 4)}


def window_index(window: int) -> Tensor:
    """Which entry of the table is for two places of a window, [window^2, window^2]."""
    side, places = 2 * window - 1, [(row, column) for row in range(window) for column in range(window)]
    return torch.tensor(
        [[(a[0] - b[0] + window - 1) * side + a[1] - b[1] + window - 1 for b in places] for a in places]
    )


def solider(semantic: bool = True) -> dict[str, Tensor]:
    """SOLIDER's Swin: `stages`, `w_msa`, `ffn.layers`, `norm0..3`, `semantic_embed_w`, `semantic_embed_b`."""
    dim = SWIN["embed_dim"]
    shapes = {"patch_embed.projection.weight": (dim, 3, 4, 4), "patch_embed.projection.bias": (dim,)}
    shapes |= {"patch_embed.norm.weight": (dim,), "patch_embed.norm.bias": (dim,)}
    index = {}
    for stage, (depth, heads) in enumerate(zip(SWIN["depths"], SWIN["num_heads"], strict=True)):
        width = dim * 2**stage
        for block in range(depth):
            name = f"stages.{stage}.blocks.{block}."
            layers = {"norm1": (width,), "attn.w_msa.qkv": (3 * width, width), "attn.w_msa.proj": (width, width)}
            layers |= {"norm2": (width,), "ffn.layers.0.0": (4 * width, width), "ffn.layers.1": (width, 4 * width)}
            for layer, shape in layers.items():
                shapes |= {f"{name}{layer}.weight": shape, f"{name}{layer}.bias": shape[:1]}
            shapes[f"{name}attn.w_msa.relative_position_bias_table"] = (13 * 13, heads)
            index[f"{name}attn.w_msa.relative_position_index"] = window_index(7)
        if stage < 3:
            merging = f"stages.{stage}.downsample."
            shapes |= {f"{merging}norm.weight": (4 * width,), f"{merging}norm.bias": (4 * width,)}
            shapes[f"{merging}reduction.weight"] = (2 * width, 4 * width)
        shapes |= {f"norm{stage}.weight": (width,), f"norm{stage}.bias": (width,)}
        if semantic:
            after = dim * 2 ** min(stage + 1, 3)
            for what in ("w", "b"):
                shapes |= {f"semantic_embed_{what}.{stage}.weight": (after, 2)}
                shapes |= {f"semantic_embed_{what}.{stage}.bias": (after,)}
    # of a size at which a wrong order, padding or shift shows
    found = {name: 20 * tensor for name, tensor in drawn(shapes, 3).items()}
    found = {name: 1 + 0.3 * t if "norm" in name and name.endswith("weight") else t for name, t in found.items()}
    found = {name: t / t[0].numel() ** 0.5 if t.ndim > 1 and "table" not in name else t for name, t in found.items()}
    return found | index


def jigsaw() -> tuple[dict[str, Tensor], set[str]]:
    """TransReID with cameras and jigsaw patches, and what stays behind."""
    own = backbone(TALL)
    content = put("base.", own | drawn({"sie_embed": (6, 1, DIM), "fc.weight": (10, DIM), "fc.bias": (10,)}, 4))
    last = f"blocks.{DEPTH - 1}."
    for branch, seed in (("b1", 11), ("b2", 12)):
        other = backbone(TALL, seed=seed)
        content |= {f"{branch}.0.{key.removeprefix(last)}": t for key, t in other.items() if key.startswith(last)}
        content |= {f"{branch}.1.{part}": other[f"norm.{part}"] for part in ("weight", "bias")}
    for place in ("", "_1", "_2", "_3", "_4"):
        content |= norm(f"bottleneck{place}.", DIM, len(place)) | classifier(f"classifier{place}.weight", DIM)
    dead = {key for key in content if key.startswith((f"base.{last}", "base.norm.", "base.fc."))}
    return content, dead


def strangers() -> dict[str, Stranger]:
    """One of each kind."""
    tall, (theirs, _) = put("base.", backbone(TALL)), pass_backbone()
    fc = {"base.fc.weight": torch.zeros(1000, DIM), "base.fc.bias": torch.zeros(1000)}
    neck = norm("bottleneck.", DIM) | classifier("classifier.weight", DIM)
    ics = {key: t.abs() if key.endswith("running_var") else t for key, t in backbone(TALL, ics=True).items()}
    made = {f"neck.norm.{key}" for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    four = (
        norm("bottleneck.", DIM) | norm("bottleneck_1.", DIM) | norm("bottleneck_2.", DIM) | norm("bottleneck_3.", DIM)
    )
    local, dead = jigsaw()
    swin = put("base.", solider())
    swin |= norm("bottleneck.", 64) | classifier("classifier.weight", 64)
    index = {key for key in swin if key.endswith("relative_position_index")}
    unused = {f"base.norm{n}.{part}" for n in (0, 1, 2) for part in ("weight", "bias")}
    semantic = {f"base.semantic_embed_{what}.3.{part}" for what in "wb" for part in ("weight", "bias")}
    fast = resnet("backbone.") | norm("heads.bottleneck.0.", 512) | classifier("heads.weight", 512)
    pixels = {
        "pixel_mean": torch.tensor([120.0, 110.0, 100.0]).view(1, 3, 1, 1),
        "pixel_std": torch.tensor([51.0, 51.0, 25.5]).view(1, 3, 1, 1),
    }
    older = resnet("backbone.", ibn=True) | norm("heads.bnneck.", 512) | classifier("heads.classifier.weight", 512)
    older |= {"heads.pool_layer.p": torch.tensor([2.5])} | pixels
    torchreid = resnet() | classifier("classifier.weight", 512) | {"classifier.bias": torch.zeros(CLASSES)}
    strong = resnet("base.") | norm("bottleneck.", 512) | classifier("classifier.weight", 512)
    return {
        "PersonViT": Stranger(tall | fc | neck, set(fc), set(), SSL),
        "TransReID-SSL ICS": Stranger(put("base.", ics) | neck, set(), set(), SSL),
        "TransReID": Stranger(put("module.", local), dead, set(), "TransReID, jigsaw patches"),
        "PASS": Stranger(
            put("base.", theirs) | fc | four | classifier("classifier.weight", 2 * DIM),
            *({*fc, *four}, made, "PASS"),
        ),
        "PASS with one neck": Stranger(
            put("base.", theirs) | norm("bottleneck.", 2 * DIM) | classifier("classifier.weight", 2 * DIM),
            *(set(), set(), "PASS"),
        ),
        "SOLIDER": Stranger({"model": swin}, index | unused | semantic, set(), "SOLIDER"),
        "fast-reid": Stranger({"model": fast, "iteration": 3}, set(), set(), "fast-reid"),
        "fast-reid IBN GeM": Stranger({"model": older}, set(pixels), set(), "fast-reid"),
        "torchreid": Stranger(
            {"state_dict": put("module.", torchreid), "epoch": 60, "rank1": 0.9},
            *({"classifier.bias"}, made, "torchreid"),
        ),
        "strong baseline": Stranger({"model": strong}, set(), set(), "strong baseline of BoT"),
    }
