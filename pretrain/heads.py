"""The projection head of iBOT (arXiv 2111.07832): one MLP for CLS and patch tokens, then prototypes."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from pretrain.backbone import Init, init_linear
from recipes.load import Section


class HeadsConfig(Section):
    """Projection head."""

    out_dim: int = Field(8192, ge=2)  # K, prototypes
    hidden_dim: int = Field(2048, ge=1)
    bottleneck_dim: int = Field(256, ge=1)
    layers: int = Field(3, ge=1)  # linear layers of the MLP, the last one to the bottleneck
    shared: bool = True  # CLS and patch tokens have the same prototypes
    teacher_shared: bool | None = (
        None  # the same for the teacher; None: as the student. iBOT: unshared with shared teacher
    )
    norm_last_layer: bool = False  # fix the length of the prototypes to 1 (steadier; iBOT does so for ViT-B)
    init: Init = "truncated_normal"

    @model_validator(mode="after")
    def _a_shared_student_has_a_shared_teacher(self) -> "HeadsConfig":
        if self.shared and self.teacher_shared is False:
            raise ValueError(
                "teacher_shared: false needs shared: false, the student has no second last layer to follow"
            )
        return self


class Prototypes(nn.Module):
    """K directions without bias: logit_k = g_k * <v_k / |v_k|, z>. g starts at 1 and learns unless it is fixed."""

    def __init__(self, dim: int, count: int, fixed_length: bool):
        super().__init__()
        self.weight_v = nn.Parameter(torch.empty(count, dim))
        nn.init.trunc_normal_(self.weight_v, std=0.02)
        gain = torch.ones(count, 1)
        if fixed_length:
            self.register_buffer("weight_g", gain)
        else:
            self.weight_g = nn.Parameter(gain)

    def weight(self) -> Tensor:
        """[K, dim]: the matrix of the logits."""
        return self.weight_g * F.normalize(self.weight_v, dim=-1)


class Head(nn.Module):
    """MLP -> L2 normalisation -> prototypes.

    The MLP runs in the precision of the backbone. The normalisation, the prototypes and the losses are float32, because
    a logit is divided by temperatures of 0.04 and less: 16 bits there gave others NaN.
    """

    def __init__(self, dim: int, config: HeadsConfig, patches: bool = True):
        """dim: of the tokens. patches: whether patch logits are needed (the MIM term)."""
        super().__init__()
        widths = [dim, *[config.hidden_dim] * (config.layers - 1), config.bottleneck_dim]
        parts: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            parts += [nn.Linear(fan_in, fan_out), nn.GELU()]
        self.mlp = nn.Sequential(*parts[:-1])
        init_linear(self.mlp, config.init)
        self.last_layer = Prototypes(config.bottleneck_dim, config.out_dim, config.norm_last_layer)
        own = patches and not config.shared
        self.last_layer2 = Prototypes(config.bottleneck_dim, config.out_dim, config.norm_last_layer) if own else None

    def bottleneck(self, tokens: Tensor) -> Tensor:
        """tokens [..., D] -> unit vectors float32 [..., bottleneck]."""
        z = self.mlp(tokens)
        with torch.autocast(tokens.device.type, enabled=False):
            return F.normalize(z.float(), dim=-1)

    def prototypes(self) -> tuple[Tensor, Tensor]:
        """Of CLS and of patch tokens, float32 [K, bottleneck] each; the same tensor where they are shared."""
        with torch.autocast(self.last_layer.weight_v.device.type, enabled=False):
            cls = self.last_layer.weight()
            return cls, cls if self.last_layer2 is None else self.last_layer2.weight()


def logits(z: Tensor, prototypes: Tensor) -> Tensor:
    """Unit vectors [..., bottleneck] and prototypes [K, bottleneck] -> logits float32 [..., K]."""
    with torch.autocast(z.device.type, enabled=False):
        return F.linear(z, prototypes)
