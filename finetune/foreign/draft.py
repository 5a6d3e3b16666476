"""What is known about a foreign model while its file is sorted: which key became what, and which did not."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

NECK = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")  # tensors of a BatchNorm


class Choices(NamedTuple):
    """What a file does not tell; None: as its project published it."""

    size: tuple[int, int] | None = None  # height, width of the images in pixels; of a ViT: of its positions
    feature: Literal["before", "after"] | None = None  # which side of the neck is searched with
    pooling: str | None = None  # see necks.NecksConfig
    last_stride: int | None = None  # of a ResNet's last stage
    semantic_weight: float | None = None  # of SOLIDER, 0..1
    normalize: Mapping[str, list[float]] | None = None  # mean and std of R, G, B in 0..1


class Made(NamedTuple):
    """What a layout says about the model."""

    style: str
    arguments: dict[str, Any]  # of backbones.build
    size: tuple[int, int]  # height, width of the images in pixels
    normalize: Mapping[str, list[float]]
    feature: Literal["before", "after"]
    pooling: str | None = None
    test_kernel: Literal["bilinear", "bicubic"] = "bilinear"  # of resizing test images


@dataclass
class Draft:
    """A model in the making: tensors by the names of methods/bot.py, and the keys of the file."""

    where: str  # the file, for errors
    choices: Choices
    keys: dict[str, Tensor]  # without wrappers
    taken: dict[str, Tensor] = field(default_factory=dict)
    origin: dict[str, tuple[str, ...]] = field(default_factory=dict)  # of what is taken: the keys it was made from
    left_out: dict[str, str] = field(default_factory=dict)  # key -> why
    notes: list[str] = field(default_factory=list)
    method: dict[str, Any] = field(default_factory=dict)  # keys of the method's section beside `name` and `necks`
    cameras: int = 0  # of the training

    def take(self, name: str, *keys: str, value: Tensor | None = None) -> None:
        """One tensor of the file, or what was made of several."""
        self.taken[name], self.origin[name] = self.keys[keys[0]] if value is None else value, keys

    def move(self, prefix: str, new: str) -> None:
        """All tensors whose keys begin with `prefix` and are not left out."""
        for key in self.keys:
            if key.startswith(prefix) and key not in self.left_out:
                self.take(new + key.removeprefix(prefix), key)

    def drop(self, pattern: str, why: str) -> None:
        """Leave out the keys that match as a whole."""
        self.left_out |= {key: why for key in self.keys if re.fullmatch(pattern, key)}

    def idle_neck(self) -> None:
        """A BatchNorm that changes nothing, for a model without one or with one that cannot be built."""
        dim = self.taken["neck.classifier.weight"].shape[1] if "neck.classifier.weight" in self.taken else 0
        for name in NECK:
            flat = torch.full((dim,), float(name in ("weight", "running_var")))
            value = torch.tensor(0) if name == "num_batches_tracked" else flat
            self.taken[f"neck.norm.{name}"], self.origin[f"neck.norm.{name}"] = value, ()

    def unknown(self) -> list[str]:
        """Keys that were neither taken nor left out."""
        spent = {key for keys in self.origin.values() for key in keys} | self.left_out.keys()
        return [key for key in self.keys if key not in spent]
