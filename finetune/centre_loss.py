"""Centre loss: features near the centre of their identity (Wen et al. 2016, ECCV; as BoT uses it, arXiv 1903.07071)."""

import torch
from torch import Tensor, nn

RATE = 0.5  # of the plain SGD that moves the centres in BoT


class CentreLoss(nn.Module):
    """One centre for each identity.

    The centres are no parameters: BoT moves them by SGD on the *unweighted* loss, apart from the network's optimiser,
    which is what `update` does. They belong to the state of a training, so that a resumed one goes on with them.
    """

    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.register_buffer("centres", torch.randn(classes, dim))  # [C, D], standard normal as in BoT's code

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Mean over the images of |f_i - c_(y_i)|^2; Wen's equation 2 has half of their sum.

        features: [B, D], not normalised. labels: int64 [B] in 0..C-1. Returns a scalar; no gradient to the centres.
        """
        with torch.autocast(features.device.type, enabled=False):
            apart = features.float() - self.centres[labels]
            return apart.square().sum(dim=1).clamp(1e-12, 1e12).mean()

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """One step of SGD on the centres, at the rate of BoT.

        The gradient of `forward` for c_j is 2/B * sum over images of identity j of (c_j - f_i): at a rate of one half
        c_j moves by 1/B of each f_i - c_j. Arguments as in `forward`, of the batch of all processes.
        """
        moves = (features.float() - self.centres[labels]) * (2 * RATE / len(labels))
        self.centres.index_add_(0, labels, moves)
