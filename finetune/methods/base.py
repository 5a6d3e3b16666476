"""The contract of a fine-tune method: what the loop in run.py calls. A method is one file beside this one."""

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from finetune.backbones import TimmBackbone
from finetune.identities import Identities
from finetune.sampling import SamplingConfig, epoch_batches
from pretrain.backbone import Backbone, Tokens
from recipes.errors import UserError
from recipes.record import RunFolder


@dataclass(frozen=True)
class ImageBatch:
    """Training images of one step of one process."""

    images: Tensor  # float32 [B, 3, H, W], normalised
    labels: Tensor  # int64 [B], classes 0..C-1
    drops: Tensor  # float32 [B, S] uniform draws, S = Method.draws; they stay on the host
    cameras: Tensor  # int64 [B], UNKNOWN where nobody knows
    words: Tensor | None = None  # int64 [B, L] word numbers of a sentence about each image, see Plan.words

    def to(self, device: torch.device) -> "ImageBatch":
        """Everything but the draws, which the host reads."""
        images, labels, cameras = (part.to(device) for part in (self.images, self.labels, self.cameras))
        return ImageBatch(images, labels, self.drops, cameras, None if self.words is None else self.words.to(device))


class Plan(NamedTuple):
    """What an epoch trains on."""

    batches: np.ndarray  # int64 [batches, B], the global ones: positions in identities.rows
    labels: np.ndarray  # int64 [N], the class of each row; a method without labels makes its own
    told: Mapping[str, Any] = MappingProxyType({})  # numbers about the epoch for a line of metrics.jsonl, if any
    notes: tuple[str, ...] = ()  # sentences for the terminal
    words: np.ndarray | None = None  # int64 [batches, B, L] word numbers beside the images; None: the method reads none

    def tell(self, folder: RunFolder, step: int, epoch: int) -> None:
        """Print the notes and write the numbers, in the main process, before step `step` of the run."""
        if folder.main and self.notes:
            print(*self.notes, sep="\n", flush=True)
        if self.told:
            folder.log({"step": step, "epoch": epoch, **self.told})


# of all identities.rows by the model as it is now, float32 [N, F], the same on all processes, which must all ask
Features = Callable[[], np.ndarray]


class Parts(NamedTuple):
    """What a method is built from."""

    backbone: Backbone | TimmBackbone
    classes: int  # C, training identities
    cameras: int  # of the training images, 0..cameras-1; 0: not known
    sampling: SamplingConfig
    seed: int
    # the captions of each training image, read when it is called; where the method's file has READS_CAPTIONS = True
    captions: Callable[[], list[tuple[str, ...]]] | None = None


class Method(nn.Module, abc.ABC):
    """A trainable system for retrieval. `forward` returns losses, so that distributed hooks fire on it."""

    def __init__(self, parts: Parts):
        super().__init__()
        self.backbone = parts.backbone
        self.sampling, self.seed = parts.sampling, parts.seed

    @property
    def draws(self) -> int:
        """Uniform draws that an image needs for stochastic depth."""
        return len(self.backbone.drops)

    def epoch(self, number: int, identities: Identities, features: Features) -> Plan:
        """What epoch `number` trains on, the same on all processes: P x K batches of the true labels by default.

        features: takes as long as to embed the training set, so only who needs them asks. A run that goes on inside an
        epoch asks for that epoch again: what was made of features then must be part of the state (`apart`).
        """
        if not identities.classes:
            raise UserError("identities.labels = none leaves no classes to learn, and this method needs them; choose "
                            "method.name=cluster_contrast, or leave identities.labels away")  # fmt: skip
        shape = self.sampling.identities_per_batch, self.sampling.images_per_identity
        return Plan(epoch_batches(identities.labels, *shape, self.seed, number), identities.labels)

    def shape(self, identities: Identities) -> tuple[int, int]:
        """How many batches the first epoch has, and how many images a global batch; without embedding anything."""
        return self.epoch(0, identities, lambda: np.empty((0, 0), np.float32)).batches.shape

    @abc.abstractmethod
    def forward(self, batch: ImageBatch) -> dict[str, Tensor]:
        """Named, already weighted losses; the loop sums them."""

    def end_step(self) -> None:
        """After the optimiser step: momentum encoder, queue, memory."""

    @abc.abstractmethod
    def embed(self, images: Tensor, cameras: Tensor | None = None) -> Tensor:
        """L2-normalised retrieval features [B, F] of images [B, 3, H, W]; called in eval mode. cameras: int64 [B],
        UNKNOWN or None where nobody knows; most methods do not look at them."""

    def tokens(self, images: Tensor, cameras: Tensor | None = None) -> Tokens:
        """What the backbone sees in images [B, 3, H, W], patch by patch; called in eval mode."""
        return self.backbone(images)

    @property
    def local_shape(self) -> tuple[int, int] | None:
        """(H, c) of `embed_local`; None: there are no local features, and no second stage of a search."""
        return None

    def embed_local(self, images: Tensor, cameras: Tensor | None = None) -> Tensor:
        """Local features, float32 [B, H, c], of images [B, 3, h, w]; called in eval mode."""
        raise AssertionError("this method has no local features")

    def local_distance(self, query: Tensor, gallery: Tensor, aligned: bool = True) -> Tensor:
        """The second stage of a search: distances float32 [q, g] of local features [q, H, c] and [g, H, c]. aligned:
        False compares each of them with the one at its own place only."""
        raise AssertionError("this method has no local features")

    @property
    def streams(self) -> Mapping[str, int]:
        """Parts of the retrieval feature and their lengths, in order; {}: it is one."""
        return {}

    @property
    def told_streams(self) -> str:
        """For the end of a sentence: what the retrieval feature is made of; "" where it is one."""
        parts = " + ".join(f"{length} {stream}" for stream, length in self.streams.items())
        return f"; feature: {parts}" if parts else ""

    def search_by(self, streams: Sequence[str]) -> None:
        """Embed with these parts only. UserError where the model has not one of them."""
        raise UserError("this model has one feature, so there are no streams to choose")

    def attention(self, images: Tensor) -> Mapping[str, Tensor]:
        """What the model learned to look at in images [B, 3, H, W]: maps float32 [B, K, h, w] in 0..1, by a name;
        called in eval mode. {}: nothing was learned."""
        return {}

    def exported(self, section: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights and `method` section of the model that comes out. section: the recipe's. What only a training needs
        may be left out of both."""
        return self.state_dict(), section

    def apart(self) -> Mapping[str, Any]:
        """What belongs to the state of a run and not to the exported model, by name: things with `state_dict` and
        `load_state_dict` as a module has them, whose tensors may be of another shape each time."""
        return {}

    @property
    def watched(self) -> list[nn.Module]:
        """Modules whose forward passes tell how fast this process is; none that waits for the others."""
        return [self.backbone]

    def optimisers(self) -> list[nn.Module]:
        """The modules that get an optimiser each; one for all by default."""
        return [self]


class Direct(nn.Module):
    """A backbone as it is, without fine-tuning: the L2-normalised CLS token, or timm's pooled feature."""

    def __init__(self, backbone: Backbone | TimmBackbone):
        super().__init__()
        self.backbone = backbone

    def embed(self, images: Tensor, cameras: Tensor | None = None) -> Tensor:
        """images [B, 3, H, W] -> [B, D]; cameras are not looked at."""
        return torch.nn.functional.normalize(self.backbone(images, patches="none").cls.float(), dim=-1)

    local_shape = None  # no second stage of a search, see Method

    def tokens(self, images: Tensor, cameras: Tensor | None = None) -> Tokens:
        """All tokens of images [B, 3, H, W]."""
        return self.backbone(images)
