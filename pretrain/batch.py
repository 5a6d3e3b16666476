"""What travels from the loader to the model, with shapes and meanings."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Views:
    """The views of one sample, as a worker makes them. L local crops, S places of drop path."""

    row: int  # in the shard set
    replaced: int  # row of the bad sample that this one stands in for, -1 if none
    global_crops: np.ndarray  # uint8 [2, H, W, 3], RGB
    local_crops: np.ndarray  # uint8 [L, h, w, 3]
    boxes: np.ndarray  # int64 [2 + L, 5]: left, top, width, height in the source image, flipped 0/1
    masks: np.ndarray  # bool [2, gh, gw], True = masked
    global_drops: np.ndarray  # float32 [2, S] uniform in [0, 1), one number for each residual branch
    local_drops: np.ndarray  # float32 [L, S]


@dataclass(frozen=True)
class Batch:
    """The views of B samples; a view-major layout, so that view v of sample b is row v * B + b when flattened."""

    rows: Tensor  # int64 [B], in the shard set
    replaced: Tensor  # int64 [B]: row of the bad sample that this one stands in for, -1 if none
    global_crops: Tensor  # uint8 [2, B, H, W, 3]
    local_crops: Tensor  # uint8 [L, B, h, w, 3]
    boxes: Tensor  # int64 [2 + L, B, 5]
    masks: Tensor  # bool [2, B, gh, gw], True = masked
    masked: Tensor  # int64 [M]: the masked patches, as places in the flattened [2 * B * gh * gw]
    mask_weights: Tensor  # float32 [M]: 1 / (masked patches of the same view)
    global_drops: Tensor  # float32 [2, B, S]
    local_drops: Tensor  # float32 [L, B, S]

    @property
    def size(self) -> int:
        return self.rows.shape[0]

    def to(self, device: torch.device) -> Batch:
        """The same batch with what the networks compute with on a device; asynchronous from pinned memory.

        The rest stays on the host, where it is read without waiting for the device.
        """
        needed = ("global_crops", "local_crops", "masks", "masked", "mask_weights")
        return dataclasses.replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in needed})

    def pin_memory(self) -> Batch:
        """Called by torch's DataLoader when pinning is on."""
        return Batch(**{f.name: getattr(self, f.name).pin_memory() for f in dataclasses.fields(self)})


def collate(samples: list[Views]) -> Batch:
    """Stack B samples. The masked places are listed here, on the host, so that the device never has to count them."""

    def stack(name: str) -> Tensor:
        return torch.from_numpy(np.stack([getattr(sample, name) for sample in samples], axis=1))

    masks = stack("masks")
    flat = masks.flatten(2)  # [2, B, N]
    weights = (1.0 / flat.sum(-1, keepdim=True).clamp(min=1)).expand(flat.shape)
    return Batch(
        rows=torch.tensor([sample.row for sample in samples]),
        replaced=torch.tensor([sample.replaced for sample in samples]),
        masks=masks,
        masked=flat.flatten().nonzero().squeeze(1),
        mask_weights=weights[flat],
        **{name: stack(name) for name in ("global_crops", "local_crops", "boxes", "global_drops", "local_drops")},
    )
