"""Forward passes of networks that others published, on the keys of their own files: what a loaded model must equal.

Written from the papers and from what the public code computes, without any module: one function a network.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def layer_norm(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def batch_norm(w: Weights, name: str, x: Tensor) -> Tensor:
    if f"{name}.IN.weight" in w:  # the first half normalised over each image
        half = x.shape[1] // 2
        first = F.instance_norm(x[:, :half], weight=w[f"{name}.IN.weight"], bias=w[f"{name}.IN.bias"])
        return torch.cat([first, batch_norm(w, f"{name}.BN", x[:, half:])], dim=1)
    stats = (w[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, *stats)


def attention(w: Weights, name: str, x: Tensor, heads: int, bias: Tensor | float = 0.0) -> Tensor:
    """x [B, L, D]; bias is added to the logits [B, heads, L, L]."""
    query, key, value = linear(w, f"{name}.qkv", x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + bias).softmax(dim=-1)
    return linear(w, f"{name}.proj", (weights @ value).transpose(1, 2).flatten(2))


def vit_block(w: Weights, name: str, x: Tensor, heads: int) -> Tensor:
    x = x + attention(w, f"{name}attn", layer_norm(w, f"{name}norm1", x, 1e-6), heads)
    hidden = F.gelu(linear(w, f"{name}mlp.fc1", layer_norm(w, f"{name}norm2", x, 1e-6)))
    return x + linear(w, f"{name}mlp.fc2", hidden)


def patches_of(w: Weights, images: Tensor) -> Tensor:
    convolved = F.conv2d(images, w["base.patch_embed.proj.weight"], w["base.patch_embed.proj.bias"], stride=16)
    return convolved.flatten(2).transpose(1, 2)


def personvit(w: Weights, images: Tensor, depth: int, heads: int) -> Tensor:
    x = patches_of(w, images)
    x = torch.cat([w["base.cls_token"].expand(len(x), -1, -1), x], dim=1) + w["base.pos_embed"]
    for block in range(depth):
        x = vit_block(w, f"base.blocks.{block}.", x, heads)
    return layer_norm(w, "base.norm", x, 1e-6)[:, 0]


def pass_vit(w: Weights, images: Tensor, depth: int, heads: int) -> Tensor:
    x = patches_of(w, images) + w["base.pos_embed"]
    first = [w["base.cls_token"] + w["base.cls_pos"]]
    first += [w[f"base.part_token{n}"] + w[f"base.part{n}_pos"] for n in (1, 2, 3)]
    x = torch.cat([*(token.expand(len(x), -1, -1) for token in first), x], dim=1)
    for block in range(depth):
        x = vit_block(w, f"base.blocks.{block}.", x, heads)
    x = layer_norm(w, "base.norm", x, 1e-6)
    return torch.cat([x[:, 0], (x[:, 1] + x[:, 2] + x[:, 3]) / 3], dim=1)


def transreid(w: Weights, images: Tensor, cameras: list[int], depth: int, heads: int) -> Tensor:
    """With camera embeddings (times 3) and four slices of the shuffled patches (shift 5, two groups)."""
    x = patches_of(w, images)
    x = torch.cat([w["base.cls_token"].expand(len(x), -1, -1), x], dim=1) + w["base.pos_embed"]
    x = x + 3.0 * w["base.sie_embed"][cameras]
    for block in range(depth - 1):
        x = vit_block(w, f"base.blocks.{block}.", x, heads)
    found = [layer_norm(w, "b1.1", vit_block(w, "b1.0.", x, heads), 1e-6)[:, 0]]
    order = [*range(5, x.shape[1]), *range(1, 5)]
    half = len(order) // 2
    order = [place for pair in zip(order[:half], order[half:], strict=True) for place in pair]
    quarter = len(order) // 4
    for part in range(4):
        piece = x[:, [0, *order[part * quarter : (part + 1) * quarter]]]
        found.append(layer_norm(w, "b2.1", vit_block(w, "b2.0.", piece, heads), 1e-6)[:, 0] / 4)
    return torch.cat(found, dim=1)


def resnet18(w: Weights, prefix: str, images: Tensor, last_stride: int, stem_act: bool, ceil: bool) -> Tensor:
    """The map [B, 512, h, w] of a ResNet-18."""
    x = batch_norm(w, f"{prefix}bn1", F.conv2d(images, w[f"{prefix}conv1.weight"], stride=2, padding=3))
    x = F.relu(x) if stem_act else x
    x = F.max_pool2d(x, 3, 2, ceil_mode=True) if ceil else F.max_pool2d(x, 3, 2, padding=1)
    for stage, stride in enumerate((1, 2, 2, last_stride), start=1):
        for block in (0, 1):
            name, step = f"{prefix}layer{stage}.{block}.", stride if block == 0 else 1
            y = F.relu(batch_norm(w, f"{name}bn1", F.conv2d(x, w[f"{name}conv1.weight"], stride=step, padding=1)))
            y = batch_norm(w, f"{name}bn2", F.conv2d(y, w[f"{name}conv2.weight"], padding=1))
            if f"{name}downsample.0.weight" in w:
                x = batch_norm(w, f"{name}downsample.1", F.conv2d(x, w[f"{name}downsample.0.weight"], stride=step))
            x = F.relu(x + y)
    return x


def window_attention(w: Weights, name: str, x: Tensor, heads: int, shift: int, window: int = 7) -> Tensor:
    """Shifted windows, place by place: two places see each other if they lie in one window of the shifted map and were
    not brought together by the shift over the edge. x [B, H, W, C]."""
    rows, columns = x.shape[1:3]
    tall, wide = -(-rows // window) * window, -(-columns // window) * window
    x = F.pad(x, (0, 0, 0, wide - columns, 0, tall - rows))
    found = torch.zeros_like(x)

    def region(place: int, side: int) -> int:  # of the shifted map
        return 0 if place < side - window else 1 if place < side - shift else 2

    table, index = w[f"{name}.relative_position_bias_table"], w[f"{name}.relative_position_index"]
    bias = table[index.flatten()].view(window**2, window**2, heads).permute(2, 0, 1)
    for top in range(0, tall, window):
        for left in range(0, wide, window):
            places = [(top + row, left + column) for row in range(window) for column in range(window)]
            regions = torch.tensor([3 * region(r, tall) + region(c, wide) for r, c in places])
            mask = -100.0 * (regions[:, None] != regions[None, :]) if shift else torch.zeros(window**2, window**2)
            r, c = ([(place[axis] + shift) % side for place in places] for axis, side in ((0, tall), (1, wide)))
            found[:, r, c] = attention(w, name, x[:, r, c], heads, bias + mask)
    return found[:, :rows, :columns]


def solider(w: Weights, images: Tensor, heads: tuple[int, ...], depths: tuple[int, ...], semantic: float) -> Tensor:
    """SOLIDER's Swin Transformer at a semantic weight; `w` without the prefix of its backbone."""
    x = F.conv2d(images, w["patch_embed.projection.weight"], w["patch_embed.projection.bias"], stride=4)
    x = layer_norm(w, "patch_embed.norm", x.permute(0, 2, 3, 1), 1e-5)
    for stage, depth in enumerate(depths):
        for block in range(depth):
            name = f"stages.{stage}.blocks.{block}."
            y = layer_norm(w, f"{name}norm1", x, 1e-5)
            x = x + window_attention(w, f"{name}attn.w_msa", y, heads[stage], 3 if block % 2 else 0)
            hidden = F.gelu(linear(w, f"{name}ffn.layers.0.0", layer_norm(w, f"{name}norm2", x, 1e-5)))
            x = x + linear(w, f"{name}ffn.layers.1", hidden)
        if stage == 3:
            break
        rows, columns = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, columns % 2, 0, rows % 2))
        size = x.shape[1] // 2, x.shape[2] // 2
        x = F.unfold(x.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2)  # channel by channel, then row, column
        x = linear(w, f"stages.{stage}.downsample.reduction", layer_norm(w, f"stages.{stage}.downsample.norm", x, 1e-5))
        if f"semantic_embed_w.{stage}.weight" in w:
            point = torch.tensor([semantic, 1 - semantic])
            scale, shift = (linear(w, f"semantic_embed_{what}.{stage}", point) for what in ("w", "b"))
            x = x * F.softplus(scale) + shift
        x = x.unflatten(1, size)
    return layer_norm(w, "norm3", x, 1e-5).mean(dim=(1, 2))
