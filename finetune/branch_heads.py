"""What MDPR (arXiv 2401.06430) makes of the maps of its two branches, and the head that each of its features has."""

import torch
from torch import Tensor, nn

from finetune.attention_maker import AttentionMaker, AttentionMakerConfig, AttentionPooling
from finetune.branches import Levels
from finetune.circle_softmax import CircleSoftmax, CircleSoftmaxConfig
from finetune.convolutions import embedding
from finetune.necks import GeM


class HardContent(nn.Module):
    """The whole map and equal pieces of its height, each embedded by weights of its own."""

    def __init__(self, channels: int, dim: int, parts: int):
        super().__init__()
        self.whole = embedding(channels, dim)
        self.parts = nn.ModuleList(embedding(channels, dim) for _ in range(parts))

    def forward(self, maps: Tensor) -> tuple[Tensor, list[Tensor]]:
        """[B, C, h, w] -> [B, dim, h, w], and parts [B, dim, h_i, w] from head to foot; rows that do not share evenly
        go to the first parts."""
        pieces = maps.tensor_split(len(self.parts), dim=2)
        return self.whole(maps), [embed(piece) for embed, piece in zip(self.parts, pieces, strict=True)]


class SoftContent(nn.Module):
    """Both levels embedded, and what the attention maps see of them. channels: C1, C2 of the levels."""

    def __init__(self, config: AttentionMakerConfig | None, channels: tuple[int, int], dim: int):
        super().__init__()
        mid, last = channels
        self.prepare = embedding(mid, mid)
        self.mid, self.last = embedding(mid, dim), embedding(last, dim)
        self.maker = None
        if config is not None:
            self.maker = AttentionMaker(config, channels)
            self.seen_mid = AttentionPooling(config.maps, mid, dim)
            self.seen_last = AttentionPooling(config.maps, last, dim)

    def forward(self, levels: Levels) -> tuple[Tensor, Levels]:
        """Both levels -> the mid one as it is attended to [B, C1, h, w], and the embedded maps [B, dim, h, w]."""
        prepared = self.prepare(levels.mid)
        return prepared, Levels(self.mid(prepared), self.last(levels.last))

    def look(self, levels: Levels, prepared: Tensor) -> tuple[Levels, Levels]:
        """Attention [B, K, h, w] of both levels, and what it sees: features [B, K, dim]. Needs a maker."""
        attention = self.maker(*levels)
        return attention, Levels(self.seen_mid(prepared, attention.mid), self.seen_last(levels.last, attention.last))


class StreamHead(nn.Module):
    """Generalised mean, unless what comes is a feature already -> BatchNorm whose bias stays 0 -> circle softmax."""

    def __init__(self, config: CircleSoftmaxConfig, dim: int, classes: int, pools: bool = True):
        super().__init__()
        self.pool = GeM() if pools else None
        self.norm = nn.BatchNorm1d(dim)
        self.norm.bias.requires_grad_(False)
        self.classifier = CircleSoftmax(config, dim, classes)

    def feature(self, maps: Tensor) -> Tensor:
        """[B, dim, h, w], or [B, dim] -> float32 [B, dim] after the BatchNorm: what is compared."""
        with torch.autocast(maps.device.type, enabled=False):
            return self.norm(maps.float() if self.pool is None else self.pool(maps))
