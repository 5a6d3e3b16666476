"""Slowly moving copies of encoders, which make the keys of MoCo (He et al. 2020, arXiv 1911.05722, eq. 2)."""

import copy
from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from recipes.load import Section


class MomentumEncodersConfig(Section):
    """How slowly the copies follow, and what is copied."""

    momentum: float = Field(0.999, ge=0, lt=1)  # share of the old weights that a step leaves
    # whether the projection into the joint space is copied as well; as published keys go through the current one
    projection: bool = False


class MomentumEncoders:
    """Copies of encoders by name. They belong to the state of a run and not to the exported model, so this is no
    module, and no optimiser and no wrapper sees them.

    Only parameters follow; the running statistics of a BatchNorm are those of the keys, as in MoCo.
    """

    def __init__(self, encoders: Mapping[str, nn.Module], momentum: float):
        self.sources, self.momentum = dict(encoders), momentum
        self.copies = nn.ModuleDict({name: copy.deepcopy(module) for name, module in encoders.items()})
        self.copies.requires_grad_(False)

    def __getitem__(self, name: str) -> nn.Module:
        return self.copies[name]

    def to(self, device: torch.device) -> None:
        """Move the copies to where the encoders are."""
        self.copies.to(device)

    @torch.no_grad()
    def update(self) -> None:
        """k <- m k + (1 - m) q for every trained parameter; to be called before the keys of a batch are made."""
        pairs = [
            (own, theirs)
            for name, source in self.sources.items()
            for own, theirs in zip(self.copies[name].parameters(), source.parameters(), strict=True)
            if theirs.requires_grad
        ]
        if pairs:
            own, theirs = zip(*pairs, strict=True)
            torch._foreach_lerp_(list(own), [value.detach() for value in theirs], 1 - self.momentum)

    def state_dict(self) -> dict[str, Tensor]:
        """For the state of a run."""
        return self.copies.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """What `state_dict` gave; RuntimeError where that is something else."""
        self.copies.load_state_dict(state)
