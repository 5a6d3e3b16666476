"""Two images beside each other: which patch is found where, drawn and counted."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from pretrain import correspondence as matches
from pretrain import drawings, photometric, views
from pretrain.agreement import COLOURS
from pretrain.looking import Eye, Looked, Seen
from pretrain.views import ViewsConfig
from recipes.progress import Meter
from shards.seeds import generator

LINES = 12  # matches drawn for a pair, as in the paper
SCALE = (0.4, 1.0)  # area of a view / area of the image: the same for every run, so that runs can be compared


class Views(NamedTuple):
    """Two views of each of some images, and where they were cut out."""

    pixels: np.ndarray  # uint8 [M, 2, H, W, 3]
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]  # left, top, width, height, flip of both


def two_views(images: dict[int, np.ndarray], seed: int, size: tuple[int, int]) -> Views:
    """Random crops, flips and colours, a function of (seed, row). images: by row, uint8 [H, W, 3]."""
    aspect = size[1] / size[0]
    geometry = ViewsConfig(global_size=size, global_scale=SCALE, ratio=(0.75 * aspect, aspect / 0.75))
    pixels, boxes = [], []
    for row, image in images.items():
        of_image = []
        for u in generator(seed, "picture views", row).random((2, views.NUMBERS + photometric.NUMBERS)).tolist():
            box = views.draw_box(u, image, False, geometry)
            changes = photometric.draw(u[views.NUMBERS :], 1, COLOURS)
            pixels.append(photometric.apply(views.crop(image, box, size), changes))
            of_image.append(box)
        boxes.append((of_image[0], of_image[1]))
    return Views(np.stack(pixels).reshape(-1, 2, *size, 3), boxes)


class Viewed(NamedTuple):
    """M pairs of views and what is seen in them."""

    views: Views
    tokens: Tensor  # [M, 2, N, D]
    maps: Tensor  # [M, 2, heads, gh, gw]
    total: matches.Matching  # the counts of all pairs


def view(eye: Eye, pairs: Views, silent: bool = True) -> Viewed:
    """Look at the views, and count which patches find their place. silent: without progress on the screen."""
    flat = pairs.pixels.reshape(-1, *eye.size, 3)
    with Meter(len(flat), "correspondence", "views", silent=silent) as meter:
        tokens, maps = (part.unflatten(0, (-1, 2)) for part in eye.see(flat, meter))
    total = matches.NO_MATCHING
    for (first, second), boxes in zip(tokens, pairs.boxes, strict=True):
        total = total + matches.matching(first, second, matches.true_places(*boxes, eye.grid), eye.grid)
    return Viewed(pairs, tokens, maps, total)


def _lines(first: Tensor, second: Tensor, attention: Tensor, mutual: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The matches that are drawn, of the LINES patches with the highest attention [heads, gh, gw]: int64 starts and
    ends, and the cosines."""
    allowed = matches.mutual(first, second) if mutual else None
    starts = matches.attended(attention.mean(0).flatten(), LINES, allowed)
    ends, cosines = matches.nearest(first, second)
    return starts, ends[starts], cosines[starts]


def view_pairs(eye: Eye, viewed: Viewed, count: int, mutual: bool) -> list[drawings.Pair]:
    """The first `count` pairs of views, with lines that are right or wrong. mutual: only patches that choose each
    other."""
    drawn = []
    for number in range(min(count, len(viewed.tokens))):
        places = matches.true_places(*viewed.views.boxes[number], eye.grid)
        inside = matches.seen_by_both(places, eye.grid)
        starts, ends, _ = _lines(*viewed.tokens[number], viewed.maps[number, 0], mutual)
        correct = matches.right(ends, places[starts], eye.grid, matches.NEAR)
        known = [bool(yes) if seen else None for seen, yes in zip(inside[starts], correct, strict=True)]
        lines = [drawings.Line(*line) for line in zip(starts.tolist(), ends.tolist(), known, strict=True)]
        caption = [f"two views: {known.count(True)} of {len(known) - known.count(None)} right"]
        caption += [f"{known.count(None)} outside of the right one"] if None in known else []
        drawn.append(drawings.Pair(*viewed.views.pixels[number], lines, caption, True))
    return drawn


def people_pairs(
    looked: Looked, pairs: Sequence[tuple[int, int]], camids: np.ndarray, mutual: bool
) -> list[drawings.Pair]:
    """Pairs of images of a person. pairs: rows of `looked`. camids: int64 [rows], < 0 unknown."""
    drawn = []
    for pair in pairs:
        first, second = (looked.rows.index(row) for row in pair)
        starts, ends, cosines = _lines(looked.tokens[first], looked.tokens[second], looked.maps[first], mutual)
        lines = [drawings.Line(*line, None) for line in zip(starts.tolist(), ends.tolist(), strict=True)]
        cameras = " and ".join(f"cam {camids[row]}" if camids[row] >= 0 else "cam ?" for row in pair)
        told = f"mean cosine {float(cosines.mean()):.2f}" if lines else "no patches choose each other"
        caption = f"one person, {cameras}", told
        drawn.append(drawings.Pair(looked.pixels[first], looked.pixels[second], lines, caption, False))
    return drawn


def correspondence(
    eye: Eye,
    images: dict[int, np.ndarray],
    shown: int,
    seed: int,
    of_people: Sequence[drawings.Pair] = (),
    mutual: bool = False,
    silent: bool = True,
) -> Seen:
    """Pairs of people, if any, then two views of the first `shown` images; the accuracy is that of all the images."""
    viewed = view(eye, two_views(images, seed, eye.size), silent)
    drawn = [*of_people, *view_pairs(eye, viewed, shown, mutual)]
    shares = viewed.total.shares()
    numbers = {
        **{"matching_accuracy": shares["same"], "matching_near": shares["near"]},
        **{"matching_chance": shares["same_chance"], "matching_near_chance": shares["near_chance"]},
        **{"matching_patches": viewed.total.patches, "matching_images": len(images)},
    }
    only = ", patches that choose each other only" if mutual else ""
    text = (
        f"Matches of patch tokens by cosine, from the {LINES} patches of the left image with the most attention{only}."
    )
    if of_people:
        text += " Two images of a person: no truth is known, the colours only tell the lines apart."
    text += (
        " Two views of one image: green is right (the patch or a neighbour); red, dashed and crossed is wrong; grey "
        "and dashed: the right view does not show the point."
    )
    told = (
        f"{len(drawn)} pairs; between two views of one image a patch finds its own place in {shares['same']:.0%} "
        f"(chance {shares['same_chance']:.1%}), it or a neighbour in {shares['near']:.0%} "
        f"(chance {shares['near_chance']:.0%}), of {len(images)} images"
    )
    return Seen(drawings.pairs_picture(drawn, eye.grid, text), numbers, told)
