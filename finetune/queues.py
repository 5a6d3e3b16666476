"""The three queues of CM-MoCo (Han et al. 2021, arXiv 2110.10807): image keys, text keys, and whose they are.

Every step the keys of the batch of all processes replace the oldest ones, in the same order on every process. A key is
a negative unless its identity is in the batch: another caption of the same person must not be pushed away.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from finetune.id_losses import gathered
from recipes.load import Section
from shards.seeds import generator

NOBODY = -1  # identity of the random vectors that the queues begin with; classes are >= 0


class QueuesConfig(Section):
    """How many keys are negatives."""

    size: int = Field(2048, ge=1)  # K, keys of each queue, over all processes; need not be a multiple of the batch


def ring_write(queue: Tensor, at: int, rows: Tensor) -> None:
    """Write rows [B, ...] into a ring [K, ...] from place `at` on, in place; of more than K rows the last K."""
    kept = rows[-len(queue) :]
    first = at + len(rows) - len(kept)
    places = (first + torch.arange(len(kept), device=queue.device)) % len(queue)
    queue[places] = kept.to(queue.dtype)


class Queues:
    """Keys and identities of the last batches. They belong to the state of a run and not to the exported model, so this
    is no module.

    dim: F, length of a key. seed: of the random unit vectors that the queues begin with.
    """

    def __init__(self, config: QueuesConfig, dim: int, seed: int):
        rng = generator(seed, "finetune/queues")
        first = torch.from_numpy(rng.standard_normal((2, config.size, dim), dtype="float32"))
        # float32 [K, F] each, L2-normalised; each in memory of its own, as the file of a state wants it
        self.images, self.texts = (part.clone() for part in F.normalize(first, dim=2))
        self.ids = torch.full((config.size,), NOBODY)  # int64 [K]
        self.at = 0  # the place that is written next
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []  # keys and labels since the last step

    def to(self, device: torch.device) -> None:
        """Move the queues where the keys are."""
        self.images, self.texts, self.ids = (part.to(device) for part in (self.images, self.texts, self.ids))

    def negatives(self, labels: Tensor) -> Tensor:
        """Which keys are negatives of the whole batch: bool [K], True where the identity is none of `labels`, int64 [B]
        of all processes."""
        return ~torch.isin(self.ids, labels)

    def remember(self, images: Tensor, texts: Tensor, labels: Tensor) -> None:
        """Keep the keys of this process, [B, F] each and L2-normalised, and the labels, int64 [B], for `push`."""
        self.seen.append((images.detach().float(), texts.detach().float(), labels))

    @torch.no_grad()
    def push(self) -> None:
        """After the optimiser step: what all processes remember replaces the oldest keys."""
        if not self.seen:
            return
        images, texts, labels = (gathered(torch.cat(part)) for part in zip(*self.seen, strict=True))
        for queue, rows in ((self.images, images), (self.texts, texts), (self.ids, labels)):
            ring_write(queue, self.at, rows)
        self.at = (self.at + len(labels)) % len(self.ids)
        self.seen.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """For the state of a run."""
        return {"images": self.images, "texts": self.texts, "ids": self.ids, "at": torch.tensor(self.at)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """What `state_dict` gave. RuntimeError where that is something else."""
        wanted = self.state_dict()
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        if shapes != {name: tuple(value.shape) for name, value in wanted.items()}:
            raise RuntimeError(f"the queues want images, texts, ids and at of their own shapes, not {shapes}")
        for name in ("images", "texts", "ids"):
            setattr(self, name, state[name].to(wanted[name].device, wanted[name].dtype, copy=True))
        self.at = int(state["at"])
        self.seen.clear()
