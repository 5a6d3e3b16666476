"""ICS, the convolutional stem with instance and batch normalisation of TransReID-SSL (arXiv 2111.12084).

It takes the place of the patch convolution of a ViT/16: a 7x7 convolution of stride 2, two of 3x3, and a projection of
8x8 with stride 8 give the same number of tokens. Parameters are named as in the published checkpoints.
"""

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from recipes.errors import UserError

CHANNELS = 64  # of the three convolutions
PATCH = 16  # pixels: stride 2 times stride 8


class IBN(nn.Module):
    """The first half of the channels normalised over each image (IN), the other half over the batch (BN), both affine.

    IBN-a of IBN-Net (arXiv 1807.09441): the first half forgets the style of a camera, the second keeps content.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.half = channels // 2
        self.IN = nn.InstanceNorm2d(self.half, affine=True)
        self.BN = nn.BatchNorm2d(channels - self.half)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, channels, H, W] -> the same shape."""
        return torch.cat([self.IN(x[:, : self.half]), self.BN(x[:, self.half :])], dim=1)


class ICSStem(PatchEmbed):
    """Images to patch embeddings; stands where timm's ViT of dynamic size has its PatchEmbed.

    Fresh weights are torch's defaults for convolutions and norms, as in the published code: uniform within
    +-1/sqrt(fan_in); scales 1, shifts 0.
    """

    def __init__(self, image_size: tuple[int, int], patch_size: int, dim: int):
        """image_size: height, width in pixels, multiples of the patch. dim: D. UserError for patches other than 16."""
        if patch_size != PATCH:
            raise UserError(
                f"backbone.stem = ics cuts images into patches of {PATCH} pixels, not of backbone.patch_size = "
                f"{patch_size}; set backbone.patch_size={PATCH}, or backbone.stem=patch"
            )
        super().__init__(image_size, patch_size, embed_dim=dim, output_fmt="NHWC", strict_img_size=False)
        self.conv = nn.Sequential(
            nn.Conv2d(3, CHANNELS, 7, stride=2, padding=3, bias=False),
            IBN(CHANNELS),
            nn.ReLU(inplace=True),
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False),
            IBN(CHANNELS),
            nn.ReLU(inplace=True),
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False),
            nn.BatchNorm2d(CHANNELS),
            nn.ReLU(inplace=True),
        )
        self.proj = nn.Conv2d(CHANNELS, dim, PATCH // 2, stride=PATCH // 2)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Another image size, as timm asks for it; the patches stay."""
        assert patch_size is None, "the stem's stride is fixed"
        super().set_input_size(img_size=img_size)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] -> [B, H / 16, W / 16, D]. H and W: multiples of 16."""
        assert all(side % PATCH == 0 for side in images.shape[-2:]), "patches must tile an image"
        return self.proj(self.conv(images)).permute(0, 2, 3, 1)


def batch_norms(module: nn.Module) -> list[nn.Module]:
    """The layers of `module` that normalise over the batch; instance and layer norms are none of them."""
    return [part for part in module.modules() if isinstance(part, _BatchNorm)]


def synchronised(module: nn.Module, processes: int, device_type: str) -> nn.Module:
    """The module with its batch statistics taken over all processes; as it is when there is one or no such layer.

    Parameters and buffers stay the same tensors under the same names. Both networks need it; the teacher needs no DDP
    around it for that, as it did with the torch of the published code. Raises UserError on CPUs: each process would
    normalise by its own share of the batch, and torch has nothing to join them.
    """
    if processes == 1 or not batch_norms(module):
        return module
    if device_type != "cuda":
        raise UserError(
            f"backbone.stem = ics normalises over the batch of all {processes} processes, which torch can do on GPUs "
            f"only and not on {device_type}; start one process, or set backbone.stem=patch"
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(module)


def train_norms(teacher: nn.Module) -> None:
    """Let the batch norms of a network in eval mode normalise by the batch, as the published teacher does.

    The momentum update moves parameters only. In eval mode the batch norms would divide by running statistics that
    nobody ever updates (mean 0, variance 1), so the targets would come from another function than the one that the
    student learns. In train mode the teacher sees the statistics of its clean global views, and its running statistics
    follow these. They are what an exported teacher normalises by, so that its features do not hang on the batch; with
    torch's momentum of 0.1 they are those of about the last ten micro-batches, of the weights that the teacher had
    there. A batch norm sees the batch: with it a run is not bit-equal on another number of processes or micro-batches.
    """
    for norm in batch_norms(teacher):
        norm.train()
