"""The networks of the textbook step: a Vision Transformer and a head, each operation written out.

After the equations of ViT (arXiv 2010.11929), DINO (arXiv 2104.14294) and iBOT (arXiv 2111.07832). Parameters are
called as in pretrain/, so that weights go from one to the other by their names.
"""

import contextlib
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Precision = Literal["float32", "published", "same"]  # see __init__.py


class Shape(NamedTuple):
    """Sizes of the networks."""

    dim: int  # D
    depth: int  # blocks
    heads: int
    hidden: int  # of the MLP in a block
    patch: int  # pixels
    grid: tuple[int, int]  # rows and columns of patches that the positions were made for
    head_dims: tuple[int, ...]  # D, hidden ..., bottleneck
    prototypes: int  # K
    shared: bool  # CLS and patch tokens have the same prototypes, of the student
    teacher_shared: bool  # the same of the teacher; iBOT: also where those of the student are not
    fixed_length: bool  # the prototypes do not learn their lengths


def drop_path(branch: Tensor, rate: float, draws: Tensor | None) -> Tensor:
    """Stochastic depth: a sample's branch [B, N, D] times 0 or 1 / (1 - rate). draws: [B] uniform in [0, 1), or None.

    Published code draws the numbers here; these come with the batch, so that two programs can compute the same.
    """
    if rate == 0.0 or draws is None:
        return branch
    keep = 1 - rate
    return branch / keep * (draws >= rate).to(branch.dtype)[:, None, None]


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d)) v of several heads, with the [N, N] matrix of every head in memory."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> [B, N, D]."""
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        weights = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, length, dim))


class Mlp(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention and MLP, each behind a norm, each added to what came in."""

    def __init__(self, shape: Shape, rate: float):
        super().__init__()
        self.rate = rate
        self.norm1 = nn.LayerNorm(shape.dim, eps=1e-6)
        self.attn = Attention(shape.dim, shape.heads)
        self.norm2 = nn.LayerNorm(shape.dim, eps=1e-6)
        self.mlp = Mlp(shape.dim, shape.hidden)

    def forward(self, x: Tensor, draws: Tensor | None) -> Tensor:
        """x [B, N, D]; draws [B, 2]: of the two branches."""
        first, second = (None, None) if draws is None else draws.unbind(1)
        x = x + drop_path(self.attn(self.norm1(x)), self.rate, first)
        return x + drop_path(self.mlp(self.norm2(x)), self.rate, second)


class PatchEmbed(nn.Module):
    """A convolution whose stride is its size."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.proj = nn.Conv2d(3, shape.dim, kernel_size=shape.patch, stride=shape.patch)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, D, rows, columns]."""
        return self.proj(images)


class Transformer(nn.Module):
    """The ViT."""

    def __init__(self, shape: Shape, drop_path_rate: float):
        super().__init__()
        rows, columns = self.grid = shape.grid
        self.patch_embed = PatchEmbed(shape)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, shape.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + rows * columns, shape.dim))
        rates = torch.linspace(0, drop_path_rate, shape.depth).tolist()
        self.blocks = nn.ModuleList(Block(shape, rate) for rate in rates)
        self.norm = nn.LayerNorm(shape.dim, eps=1e-6)

    def positions(self, grid: Sequence[int]) -> Tensor:
        """Position embeddings [1, 1 + rows * columns, D] for crops of this grid, resampled anew at every forward.

        As DINO does it: the scale factor is that of the wanted size plus 0.1, which was meant against rounding.
        """
        if tuple(grid) == tuple(self.grid):
            return self.pos_embed
        own, dim = self.pos_embed[:, 1:], self.pos_embed.shape[-1]
        own = own.reshape(1, *self.grid, dim).permute(0, 3, 1, 2)
        scale = tuple((wanted + 0.1) / have for wanted, have in zip(grid, self.grid, strict=True))
        own = F.interpolate(own, scale_factor=scale, mode="bicubic")
        assert tuple(own.shape[2:]) == tuple(grid)
        return torch.cat([self.pos_embed[:, :1], own.permute(0, 2, 3, 1).reshape(1, -1, dim)], dim=1)

    def forward(self, images: Tensor, mask: Tensor | None, embedding: Tensor | None, draws: Tensor | None) -> Tensor:
        """images [B, 3, H, W]; mask bool [B, rows, columns], True = replaced by `embedding` [1, D]; draws [B, 2 depth].

        Returns all tokens after the last norm [B, 1 + rows * columns, D], CLS first.
        """
        x = self.patch_embed(images)
        grid = x.shape[2:]
        x = x.permute(0, 2, 3, 1)
        if mask is not None:
            x[mask] = embedding.to(x.dtype)
        x = x.flatten(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.positions(grid)
        for number, block in enumerate(self.blocks):
            x = block(x, None if draws is None else draws[:, 2 * number : 2 * number + 2])
        return self.norm(x)


class Backbone(nn.Module):
    """The ViT, and of a student the embedding of masked patches."""

    def __init__(self, shape: Shape, masked: bool, drop_path_rate: float):
        super().__init__()
        self.vit = Transformer(shape, drop_path_rate)
        self.mask_embedding = nn.Parameter(torch.zeros(1, shape.dim)) if masked else None

    def forward(self, images: Tensor, mask: Tensor | None = None, draws: Tensor | None = None) -> Tensor:
        return self.vit(images, mask, self.mask_embedding, draws)


class Prototypes(nn.Module):
    """A linear layer without bias whose weights have direction v and length g (weight normalisation)."""

    def __init__(self, bottleneck: int, count: int, fixed_length: bool):
        super().__init__()
        self.weight_v = nn.Parameter(torch.zeros(count, bottleneck))
        gain = torch.ones(count, 1)
        if fixed_length:
            self.register_buffer("weight_g", gain)
        else:
            self.weight_g = nn.Parameter(gain)

    def forward(self, z: Tensor) -> Tensor:
        """[..., bottleneck] -> [..., K]."""
        return F.linear(z, self.weight_g * self.weight_v / self.weight_v.norm(dim=1, keepdim=True))


class Head(nn.Module):
    """iBOT's head: one MLP for all tokens, L2 norm, prototypes for CLS and for patches."""

    def __init__(self, shape: Shape, precision: Precision):
        super().__init__()
        self.precision = precision
        parts: list[nn.Module] = []
        for fan_in, fan_out in zip(shape.head_dims[:-1], shape.head_dims[1:], strict=True):
            parts += [nn.Linear(fan_in, fan_out), nn.GELU()]
        self.mlp = nn.Sequential(*parts[:-1])
        last = (shape.head_dims[-1], shape.prototypes, shape.fixed_length)
        self.last_layer = Prototypes(*last)
        self.last_layer2 = None if shape.shared else Prototypes(*last)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """All tokens [B, 1 + N, D] -> logits of CLS [B, K] and of all patches [B, N, K]."""
        z = self.mlp(tokens)
        with torch.autocast(z.device.type, enabled=False) if self.precision == "same" else contextlib.nullcontext():
            z = F.normalize(z.float() if self.precision == "same" else z, dim=-1)
            return self.last_layer(z[:, 0]), (self.last_layer2 or self.last_layer)(z[:, 1:])


class Network(nn.Module):
    """Backbone and head."""

    def __init__(
        self,
        shape: Shape,
        masked: bool = False,
        drop_path_rate: float = 0.0,
        precision: Precision = "float32",
    ):
        super().__init__()
        self.backbone = Backbone(shape, masked, drop_path_rate)
        self.head = Head(shape, precision)

    def forward(
        self, crops: Sequence[Tensor], masks: Sequence[Tensor] | None, draws: Sequence[Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """V crops of one size, each [B, 3, H, W], their masks [B, rows, columns] and draws [B, 2 depth].

        Returns logits of CLS [V B, K] and of all patches [V B, N, K].
        """
        images = torch.cat(list(crops))
        mask = None if masks is None else torch.cat(list(masks))
        return self.head(self.backbone(images, mask, None if draws is None else torch.cat(list(draws))))
