"""Which patch of one image belongs to which of another, by the nearest features (figure 6 of PersonViT; iBOT).

Between two views of one image the right answer is known from the geometry of the crops, so it can be counted: the
matching accuracy, a number without labels for what the patch tokens are worth. Between two images of a person there is
no truth; the lines are to be looked at.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]  # rows, columns of patches
SAME, NEAR = (
    0.5,
    1.5,
)  # patches that a match may be off in each direction: the patch itself; it or one of its neighbours


def nearest(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """For each patch of an image the most similar one of another, by cosine; of equal ones the first in reading order.

    first [..., N, D], second [..., M, D]: patch tokens after the final norm. Returns int64 [..., N], places in 0..M-1,
    and the cosines float32 [..., N].
    """
    cosines = F.normalize(first.float(), dim=-1) @ F.normalize(second.float(), dim=-1).transpose(-2, -1)
    best = cosines.max(dim=-1)
    return best.indices, best.values


def mutual(first: Tensor, second: Tensor) -> Tensor:
    """Which patches of `first` are the nearest of their nearest in `second`: bool [..., N]; arguments as `nearest`."""
    there, back = nearest(first, second)[0], nearest(second, first)[0]
    return back.gather(-1, there) == torch.arange(first.shape[-2], device=first.device)


def attended(attention: Tensor, count: int, allowed: Tensor | None = None) -> Tensor:
    """Places of the `count` patches with the highest attention, highest first: int64 [at most count].

    attention: [N], of CLS, mean over the heads. allowed: bool [N], others are left out.
    """
    values = attention if allowed is None else attention.masked_fill(~allowed, -1)
    order = values.sort(descending=True, stable=True).indices
    return order[: count if allowed is None else min(count, int(allowed.sum()))]


def true_places(first: Sequence[int], second: Sequence[int], grid: Grid) -> Tensor:
    """Where the centres of the patches of one view lie in another view of the same image: float64 [N, 2].

    first, second: left, top, width, height, flip of the crops in pixels of the image, as `views.draw_box` gives them;
    both have the same patch grid afterwards. A place is (row, column) in patches of the second view: (0, 0) is its
    upper left corner, (0.5, 0.5) the centre of its first patch; outside of 0..rows and 0..columns it does not see it.
    """
    rows, columns = grid
    down = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    across = (torch.arange(columns, dtype=torch.float64) + 0.5) / columns
    left, top, width, height, flip = first
    x, y = left + (1 - across if flip else across) * width, top + down * height
    left, top, width, height, flip = second
    across, down = (x - left) / width, (y - top) / height
    across = 1 - across if flip else across
    return torch.stack(torch.meshgrid(down * rows, across * columns, indexing="ij"), dim=-1).flatten(0, 1)


def seen_by_both(places: Tensor, grid: Grid) -> Tensor:
    """Which of the places [N, 2] lie inside the view: bool [N]."""
    return ((places >= 0) & (places < torch.tensor(grid, device=places.device))).all(-1)


def right(found: Tensor, places: Tensor, grid: Grid, tolerance: float) -> Tensor:
    """Whether each found patch (int64 [N] or [N, C]) is within `tolerance` patches of its true place [N, 2], in rows
    and in columns. bool, of the shape of `found`."""
    rows = torch.div(found, grid[1], rounding_mode="floor")
    centres = torch.stack([rows, found % grid[1]], dim=-1) + 0.5
    wanted = places if found.dim() == 1 else places[:, None]
    return ((centres - wanted).abs() <= tolerance).all(-1)


class Matching(NamedTuple):
    """How many patches of a view are found again in another view of the same image; counts of patches."""

    patches: int  # centres of the first views that the second ones see, too: the questions
    same: int  # answered by the patch that holds the true place
    near: int  # by it or one of its neighbours
    same_chance: float  # expected of somebody who guesses
    near_chance: float

    def __add__(self, other: "Matching") -> "Matching":  # type: ignore[override]
        return Matching(*(a + b for a, b in zip(self, other, strict=True)))

    def shares(self) -> dict[str, float]:
        """Of the patches, in 0..1; nan where no patch is seen by both."""
        values = zip(self._fields[1:], self[1:], strict=True)
        return {name: count / self.patches if self.patches else float("nan") for name, count in values}


NO_MATCHING = Matching(0, 0, 0, 0.0, 0.0)


def matching(first: Tensor, second: Tensor, places: Tensor, grid: Grid) -> Matching:
    """The counts of one pair of views. first, second: patch tokens [N, D]. places: of `true_places`, [N, 2]."""
    found, places = nearest(first, second)[0].cpu(), places.cpu()
    inside = seen_by_both(places, grid)
    found, places = found[inside], places[inside]
    guesses = torch.arange(grid[0] * grid[1]).expand(len(found), -1)
    chance = [float(right(guesses, places, grid, off).double().mean(-1).sum()) for off in (SAME, NEAR)]
    hits = [int(right(found, places, grid, off).sum()) for off in (SAME, NEAR)]
    return Matching(len(found), *hits, *chance)
