"""Where the last block looks from its CLS token: self-attention maps, one a head (figure 5 of PersonViT)."""

import torch
from torch import Tensor

from pretrain.backbone import Backbone, Tokens


@torch.no_grad()
def cls_attention(backbone: Backbone, images: Tensor, added: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) of the last block, q of CLS and k of the patches: float32 [B, heads, gh, gw].

    images: float [B, 3, H, W], normalised, sides multiples of the patch; gh x gw is their patch grid, so rectangular
    images and other sizes than that of the training come out right. added: as in `Backbone.forward`. The softmax runs
    over all tokens and only the patches are given, so a map sums to 1 less what goes to CLS itself and to registers.
    The backbone is taken in the mode that it is in; call `eval()` first.
    """
    return look(backbone, images, added)[1]


@torch.no_grad()
def look(backbone: Backbone, images: Tensor, added: Tensor | None = None) -> tuple[Tokens, Tensor]:
    """One forward: all tokens after the final norm as `Backbone.forward` gives them, and `cls_attention`."""
    tokens, last = backbone.before(-1, images, added=added), backbone.vit.blocks[-1:]
    ends = backbone.vit.norm(backbone.through(tokens, last, None, backbone.drops[-2:]))
    block, prefix, patch = last[0], backbone.vit.num_prefix_tokens, backbone.arguments["patch_size"]
    attn = block.attn
    qkv = attn.qkv(block.norm1(tokens)).unflatten(-1, (3, attn.num_heads, -1))  # [B, L, 3, heads, d]
    q, k = attn.q_norm(qkv[:, 0, 0]), attn.k_norm(qkv[:, :, 1])
    scores = torch.einsum("bhd,blhd->bhl", q.float() * attn.scale, k.float())
    maps = scores.softmax(-1)[..., prefix:]
    grid = images.shape[2] // patch, images.shape[3] // patch
    return Tokens(ends[:, 0], ends[:, prefix:], ends[:, 1:prefix]), maps.unflatten(-1, grid)


def strongest(attention: Tensor, mass: float = 0.6) -> Tensor:
    """The smallest set of patches that holds `mass` of what a map gives to patches: bool, True = in the set.

    attention: [..., gh, gw], >= 0. mass: in (0, 1]. Of equal patches the first in reading order is taken. DINO (arXiv
    2104.14294) shows its maps so, with 0.6.
    """
    assert 0 < mass <= 1, mass
    flat = attention.flatten(-2).double()
    values, order = flat.sort(dim=-1, descending=True, stable=True)
    before = values.cumsum(-1) - values  # held by the patches that come earlier
    enough = before < mass * values.sum(-1, keepdim=True)
    enough[..., 0] = True  # a map without any attention has its first patch
    return torch.zeros_like(flat, dtype=torch.bool).scatter(-1, order, enough).unflatten(-1, attention.shape[-2:])
