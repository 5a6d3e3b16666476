"""The aligned distance of two people that are cut into stripes: AlignedReID, Zhang et al. 2017 (arXiv 1711.08184).

Two images have H local features each, from head to foot. The distance is that of the cheapest path through the matrix
of all pairs of stripes, from the two heads to the two feet, down or right at each step: a person who stands lower in
one box than in the other still meets stripe by stripe. A path has 2H - 1 cells, H of them at most on the diagonal, so
an image has a distance above 0 to itself: it is a cost of matching and no metric.
"""

import torch
from torch import Tensor

CELLS = 1 << 24  # numbers of element distances that live at once: 64 MB


def elements(a: Tensor, b: Tensor) -> Tensor:
    """Distances of all stripes of one image to all of another, float32 [..., H, H'], in [0, 1).

    The paper's (e^x - 1) / (e^x + 1) of the Euclidean distance x is tanh(x / 2), which does not overflow.
    a: [..., H, c], b: [..., H', c], float, of any length.
    """
    with torch.autocast(a.device.type, enabled=False):
        # without matrix products: they would lose what is near 0
        apart = torch.cdist(a.float(), b.float(), compute_mode="donot_use_mm_for_euclid_dist")
        return torch.tanh(apart / 2)


def all_elements(a: Tensor, b: Tensor) -> Tensor:
    """`elements` of every image with every other one: a [n, H, c], b [m, H', c] -> [n, m, H, H']."""
    found = elements(a.flatten(0, 1), b.flatten(0, 1))
    return found.unflatten(1, b.shape[:2]).unflatten(0, a.shape[:2]).transpose(1, 2)


def shortest(d: Tensor) -> Tensor:
    """Cost of the cheapest path from cell (1, 1) to cell (H, H'). d: [..., H, H'] -> [...].

    S(i, j) = min(S(i - 1, j), S(i, j - 1)) + d(i, j), for all cells of an anti-diagonal at once. Where both ways cost
    the same the gradient is shared between them.
    """
    rows, columns = d.shape[-2:]
    before, first = d[..., 0, :1], 0  # costs of an anti-diagonal, and the row of its first cell
    for diagonal in range(1, rows + columns - 1):
        start, end = max(0, diagonal - columns + 1), min(diagonal, rows - 1)
        row = torch.arange(start, end + 1, device=d.device)
        # a cell of row i comes from rows i - 1 and i of the anti-diagonal before; outside of it there is no way
        known = torch.nn.functional.pad(before, (1, 1), value=torch.inf)
        at = row - first + 1
        before = torch.minimum(known[..., at - 1], known[..., at]) + d[..., row, diagonal - row]
        first = start
    return before[..., 0]


def diagonal(d: Tensor) -> Tensor:
    """The distance without alignment: the sum of d(i, i). d: [..., H, H] -> [...]."""
    return d.diagonal(dim1=-2, dim2=-1).sum(dim=-1)


def path(d: Tensor) -> list[tuple[int, int]]:
    """The cells of the cheapest path, from (0, 0) to (H - 1, H' - 1). d: [H, H']. Of two equal ways the upper one."""
    cost = d.double().cpu().clone()
    rows, columns = cost.shape
    for i in range(rows):
        for j in range(columns):
            ways = [cost[i - 1, j]] * (i > 0) + [cost[i, j - 1]] * (j > 0)
            if ways:
                cost[i, j] += min(ways)
    cells = [(rows - 1, columns - 1)]
    while cells[-1] != (0, 0):
        i, j = cells[-1]
        up = i > 0 and (j == 0 or cost[i - 1, j] <= cost[i, j - 1])
        cells.append((i - 1, j) if up else (i, j - 1))
    return cells[::-1]


def _fast_elements(a: Tensor, b: Tensor) -> Tensor:
    """`all_elements` by one matrix product: twenty times as fast, and off by up to 4e-4 of the lengths near 0."""
    one, other = a.float().flatten(0, 1), b.float().flatten(0, 1)
    squared = one.square().sum(1)[:, None] + other.square().sum(1)[None, :] - 2 * one @ other.T
    found = squared.clamp_(min=0).sqrt_().div_(2).tanh_()
    return found.unflatten(1, b.shape[:2]).unflatten(0, a.shape[:2]).transpose(1, 2)


@torch.no_grad()
def pairwise(a: Tensor, b: Tensor, aligned: bool = True, cells: int = CELLS) -> Tensor:
    """The distance of every image to every other one, float32 [n, m]. a: [n, H, c], b: [m, H, c], on one device.

    aligned: False takes the diagonal. cells: how many element distances live at once; the result does not depend on it.
    """
    found = torch.empty(len(a), len(b), device=a.device)
    reduce = shortest if aligned else diagonal
    each = a.shape[1] * b.shape[1]
    columns = max(1, min(len(b), cells // each))
    rows = max(1, cells // (each * columns))
    for i in range(0, len(a), rows):
        for j in range(0, len(b), columns):
            part = _fast_elements(a[i : i + rows], b[j : j + columns])
            found[i : i + rows, j : j + columns] = reduce(part)
    return found
