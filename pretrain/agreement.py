"""How well a teacher knows an image again that it sees twice: a score without labels, to compare teachers.

Every image is seen in VIEWS random views: small crops at another place, in other colours, mirrored. The score is how
near the top the other view of the same image stands among those of all images, when they are ordered by the cosine of
their CLS tokens. The effective rank (RankMe, arXiv 2210.02885) stands beside it, to see a collapse. docs/adapting.md
has how both followed the accuracy of a search, and where they did not.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pretrain import photometric, views
from pretrain.backbone import Backbone
from pretrain.health import ROWS, effective_rank
from pretrain.loader import LoaderConfig
from pretrain.photometric import PhotometricConfig, normalize
from pretrain.views import ViewsConfig
from recipes.errors import UserError
from recipes.progress import Meter
from shards import keep_list
from shards.cache import CacheConfig
from shards.decoding import pixels
from shards.reader import ShardReader
from shards.schema import BadSample
from shards.seeds import generator

VIEWS = 4  # of an image
SCALE = (0.2, 0.6)  # area of a view / area of the image: smaller than a global crop, so that good teachers differ too
# the same for every run, whatever its recipe changes: a teacher that was taught to ignore colours, which tell people
# apart, must not be asked in views without them. No gray, blur, solarise
COLOURS = PhotometricConfig(jitter=1.0, gray=0.0, blur=(0.0, 0.0, 0.0), solarize=(0.0, 0.0, 0.0))
NUMBERS = views.NUMBERS + photometric.NUMBERS  # random numbers of a view
LEAST = 32  # images; fewer say nothing
CHUNK = 4096  # rows of the matrix of cosines in memory at a time
TIE = 1e-6  # cosines that differ by less are equal
BATCH = 256  # views of one forward pass
REMOTE_SHARDS = 4  # of a remote set at least, so that a set whose shards differ is not judged by one of them


def reciprocal_ranks(first: Tensor, second: Tensor) -> Tensor:
    """1 / rank of second[i] among all rows of `second`, ordered by cosine with first[i]; float32 [N] in [1 / N, 1].

    first, second: finite float [N, D], two views of the same N images. Others as near as the own one count as nearer,
    so equal features for all images give 1 / N.
    """
    first, second = F.normalize(first.float(), dim=1), F.normalize(second.float(), dim=1)
    ranks = []
    for at in range(0, len(first), CHUNK):
        cosines = first[at : at + CHUNK] @ second.T
        places = torch.arange(len(cosines), device=cosines.device)
        own = cosines[places, places + at]
        ranks.append((cosines >= own[:, None] - TIE).sum(1))
    return 1 / torch.cat(ranks).float()


class Agreement(NamedTuple):
    """What one teacher shows on N images."""

    reciprocal: np.ndarray  # float64 [N] in [1 / N, 1]: mean over the views of 1 / rank of the next view
    rank1: float  # share of the views whose nearest view is the next one of the same image, 0..1
    effective_rank: float  # of the features of the first views, in [1, min(N, D)]; nan where a feature is not finite

    @property
    def score(self) -> float:
        """Mean reciprocal rank, in [1 / N, 1]; teachers are compared by it."""
        return float(self.reciprocal.mean())


def agreement(features: Tensor) -> Agreement:
    """The scores of float [N, V, D], V views of each of N images; view v + 1 is looked for from view v.

    Features that are not finite count as no agreement at all. The effective rank is of ROWS images spread over the N.
    """
    count = len(features)
    some = features[torch.linspace(0, count - 1, min(count, ROWS)).long(), 0]
    if not torch.isfinite(features).all():
        return Agreement(np.full(count, 1 / count), 0.0, math.nan)
    pairs = zip(features.unbind(1), features.roll(-1, 1).unbind(1), strict=True)
    found = torch.stack([reciprocal_ranks(view, after) for view, after in pairs])  # [V, N]
    return Agreement(found.mean(0).double().cpu().numpy(), float((found == 1).double().mean()), effective_rank(some))


class Images(NamedTuple):
    """The images that teachers are compared on."""

    reader: ShardReader
    rows: np.ndarray  # int64 [N], ascending
    kind: str  # where they come from, in words


def draw(reader: ShardReader, candidates: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` of the candidate rows (int64, ascending) or all if there are fewer; ascending, a function of the seed.

    Of a remote set they come from few shards, drawn as well: each has to be fetched as a whole. UserError below LEAST.
    """
    if reader.remote:
        ends = np.cumsum(reader.shard_sizes)
        shard = np.searchsorted(ends, candidates, side="right")
        order = generator(seed, "agreement shards").permutation(np.unique(shard))
        held = np.cumsum(np.bincount(shard)[order])
        enough = max(REMOTE_SHARDS, int(np.searchsorted(held, count)) + 1)
        candidates = candidates[np.isin(shard, order[:enough])]
    if min(len(candidates), count) < LEAST:
        raise UserError(f"{min(len(candidates), count)} images say nothing about a teacher; it takes {LEAST} at least")
    return np.sort(generator(seed, "agreement rows").permutation(candidates)[:count])


def _kept_by_chance(path: Path) -> bool:
    """Whether shards/cfs_keep.py drew this keep-list: what it leaves out is like what it keeps then."""
    if path.suffix.lower() != ".npz":
        return False
    with np.load(path, allow_pickle=False) as stored:
        return json.loads(str(stored["facts"])).get("by") == "random"


def choose_images(data: LoaderConfig, cache: CacheConfig, count: int, seed: int, others: Sequence[str] = ()) -> Images:
    """Up to `count` images: of the sets `others` if given; else those that a random keep-list of the training left out;
    else, if there is none or too little is left, training images. `kind` tells which."""
    if others:
        reader = ShardReader(others, ("unlabeled", "train"), cache=cache)
        return Images(reader, draw(reader, np.arange(len(reader)), count, seed), f"images of {', '.join(others)}")
    reader = ShardReader(data.shards, data.splits, data.keep, cache)
    if data.keep is not None and _kept_by_chance(data.keep):
        whole = ShardReader(data.shards, data.splits, cache=cache)
        left = np.setdiff1d(np.arange(len(whole)), keep_list.load(data.keep, whole))
        if len(left) >= LEAST:
            return Images(whole, draw(whole, left, count, seed), f"held out of the training by {data.keep}")
    rows = draw(reader, np.arange(len(reader)), count, seed)
    return Images(reader, rows, "training images, in views that the training did not make")


class Probe(Dataset):
    """Place among the images -> its views, uint8 [VIEWS, H, W, 3], or None for a damaged image.

    Every random number is a function of (seed, row), so all teachers see the same views.
    """

    def __init__(self, images: Images, geometry: ViewsConfig, seed: int):
        """geometry: of the recipe; size, aspect ratio and flip of a view are those of a global crop."""
        self.images, self.seed = images, seed
        self.geometry = geometry.model_copy(update={"global_scale": SCALE})
        cv2.setNumThreads(1)  # OpenCV's threads do not live on in a forked worker

    def __len__(self) -> int:
        return len(self.images.rows)

    def __getitem__(self, place: int) -> np.ndarray | None:
        row = int(self.images.rows[place])
        try:
            sample = self.images.reader[row]
            image = pixels(sample.image, f"sample {sample.key!r}")
        except BadSample:
            return None  # the packing and the training have told of it
        made = []
        for u in generator(self.seed, "agreement", row).random((VIEWS, NUMBERS), dtype=np.float32).tolist():
            box = views.draw_box(u, image, False, self.geometry)
            crop = views.crop(image, box, self.geometry.global_size)
            made.append(photometric.apply(crop, photometric.draw(u[views.NUMBERS :], 1, COLOURS)))
        return np.stack(made)


def stack(samples: list[np.ndarray | None]) -> Tensor:
    """The sound images of a batch: uint8 [B, VIEWS, H, W, 3]."""
    sound = [torch.from_numpy(sample) for sample in samples if sample is not None]
    return torch.stack(sound) if sound else torch.empty(0, dtype=torch.uint8)


@torch.no_grad()
def measure(
    backbone: Backbone,
    probe: Probe,
    colours: tuple[Sequence[float], Sequence[float]],
    workers: int,
    accelerator: Accelerator,
    meter: Meter,
) -> Agreement:
    """The agreement of one backbone, by this process alone. colours: mean and std of its input. UserError if fewer than
    LEAST images are sound."""
    backbone = backbone.to(accelerator.device).eval()
    pin = accelerator.device.type == "cuda"
    loader = DataLoader(probe, BATCH // VIEWS, num_workers=workers, collate_fn=stack, pin_memory=pin)
    features = []
    for batch, crops in enumerate(loader):
        if len(crops):
            images = normalize(crops.to(accelerator.device, non_blocking=True).flatten(0, 1), *colours)
            with accelerator.autocast():
                (tokens,) = backbone.packed([images], None, None, ["none"])
            features.append(tokens.cls.float().unflatten(0, (-1, VIEWS)))
        meter.advance(min(loader.batch_size, len(probe) - batch * loader.batch_size))
    if sum(map(len, features)) < LEAST:
        raise UserError(f"fewer than {LEAST} of the {len(probe)} images can be read; see shards/check.py")
    return agreement(torch.cat(features))
