"""The text encoder of Han et al. 2021 (arXiv 2110.10807), section 3.1: a Bi-GRU over word vectors, maximum over time.

A sentence has the same feature whatever stands beside it in the batch. The published code takes the maximum over the
zeros behind a sentence that is shorter than the longest of its batch as well, so that its features change with the
batch.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from finetune.words import PADDING
from recipes.load import Section


class TextEncoderConfig(Section):
    """Size, and what the maximum is taken over."""

    hidden: int = Field(512, ge=1)  # of each direction; the feature has twice as many numbers
    # "masked": over the words of the sentence. "zeros": over a zero as well wherever a sentence is shorter than
    # words.longest, which is what the published weights see when every sentence is padded to that length
    padding: Literal["masked", "zeros"] = "masked"


class TextEncoder(nn.Module):
    """Vectors of words -> feature of the sentence, `dim` numbers. In float32: a GRU adds up over a hundred steps.

    word_dim: D of a vector. longest: words that a sentence may have.
    """

    def __init__(self, config: TextEncoderConfig, word_dim: int, longest: int):
        super().__init__()
        self.zeros, self.longest, self.dim = config.padding == "zeros", longest, 2 * config.hidden
        # without bias a step over a zero vector keeps the state at zero, so the backward direction, which begins with
        # the padding, comes to the last word as if there were none
        self.gru = nn.GRU(word_dim, config.hidden, batch_first=True, bidirectional=True, bias=False)

    def forward(self, vectors: Tensor, numbers: Tensor) -> Tensor:
        """vectors: [B, L, D], 0 at the padding. numbers: int64 [B, L], word numbers, PADDING behind the end of a
        sentence, which has a word at least. Returns float32 [B, dim]."""
        with torch.autocast(vectors.device.type, enabled=False):
            there = numbers != PADDING  # True: a word
            states = self.gru(vectors.float())[0]
            found = states.masked_fill(~there[:, :, None], -torch.inf).amax(dim=1)
            if self.zeros:
                short = there.sum(dim=1, keepdim=True) < self.longest
                found = torch.where(short, found.clamp(min=0), found)
            return found


def trimmed(numbers: Tensor) -> Tensor:
    """Word numbers [B, L] without the columns that are padding for all: the GRU need not walk them."""
    used = (numbers != PADDING).any(dim=0)
    return numbers[:, : int(used.nonzero().max()) + 1]
