"""The loader: a position alone decides the views, whatever the workers, the processes and what was asked before."""

import dataclasses
import hashlib
import itertools
import pickle

import cv2
import numpy as np
import pytest
import torch

from pretrain import masks, photometric, views, views_pil
from pretrain.batch import Batch, Views, collate
from pretrain.loader import LoaderConfig, MicroBatches, ViewMaker, build_loader, micro_batch
from pretrain.masks import MasksConfig
from pretrain.photometric import PhotometricConfig
from shards.images import decode
from shards.seeds import generator

FIELDS = [field.name for field in dataclasses.fields(Views)]


def equal(one: Views, other: Views) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in FIELDS)


def equal_batches(one: Batch, other: Batch) -> bool:
    return all(torch.equal(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(Batch))


def test_views_by_hand(make_views, train_reader):
    for backend, way in (("fast", (views.crop, photometric.apply)), ("pil", (views_pil.crop, views_pil.apply))):
        maker = make_views(seed=7, backend=backend)
        for position in (0, 5, 52, 60):
            made = maker[position]
            epoch, row = maker.order(position)
            assert (made.row, made.replaced, epoch) == (row, -1, position // 53)
            image = np.asarray(decode(train_reader[row].image))
            rng = generator(7, "views", epoch, row)
            table = rng.random((5, 33), dtype=np.float32).tolist()
            drops = rng.random((5, 4), dtype=np.float32)
            for view, u in enumerate(table):
                crops = made.global_crops if view < 2 else made.local_crops
                box = views.draw_box(u[:23], image, view >= 2, maker.views)
                changes = photometric.draw(u[23:], min(view, 2), PhotometricConfig())
                expected = way[1](way[0](image, box, (64, 32) if view < 2 else (32, 16)), changes)
                assert np.array_equal(crops[view if view < 2 else view - 2], expected)
                assert tuple(made.boxes[view]) == box
            assert np.array_equal(np.concatenate([made.global_drops, made.local_drops]), drops)
            rng = generator(7, "masks", epoch, row)
            expected = [masks.draw_mask(rng, (8, 4), MasksConfig()) for _ in range(2)]
            assert np.array_equal(made.masks, expected)


def test_the_numbers_of_a_view_do_not_hang_on_how_many_there_are(make_views):
    few, many = make_views(local_count=1), make_views(local_count=6)
    for n in range(5):
        assert np.array_equal(few[n].boxes, many[n].boxes[:3])
        assert np.array_equal(few[n].local_crops[0], many[n].local_crops[0])


def test_shapes_and_types(make_views):
    made = make_views()[0]
    assert {name: (getattr(made, name).shape, getattr(made, name).dtype) for name in FIELDS[2:]} == {
        "global_crops": ((2, 64, 32, 3), np.uint8),
        "local_crops": ((3, 32, 16, 3), np.uint8),
        "boxes": ((5, 5), np.int64),
        "masks": ((2, 8, 4), bool),
        "global_drops": ((2, 4), np.float32),
        "local_drops": ((3, 4), np.float32),
    }


def test_without_local_views(make_views):
    made = make_views(local_count=0)[0]
    assert made.local_crops.shape == (0, 32, 16, 3)
    assert made.local_drops.shape == (0, 4)
    assert made.boxes.shape == (2, 5)


def test_a_position_alone_decides(make_views):
    one, other = make_views(), pickle.loads(pickle.dumps(make_views()))
    forward = [one[n] for n in range(12)]
    backward = [other[n] for n in reversed(range(12))][::-1]
    assert all(equal(a, b) for a, b in zip(forward, backward, strict=True))


def test_views_of_epochs_samples_and_seeds_differ(make_views):
    maker = make_views()
    boxes = [maker[n].boxes for n in range(2 * 53)]
    rows = [maker.order(n)[1] for n in range(2 * 53)]
    assert sorted(rows[:53]) == sorted(rows[53:]) == list(range(53))
    again = dict(zip(rows[53:], boxes[53:], strict=True))
    assert not any(np.array_equal(box, again[row]) for row, box in zip(rows[:53], boxes[:53], strict=True))
    assert len({box.tobytes() for box in boxes}) == 106
    assert len({tuple(view) for box in boxes for view in box}) > 0.9 * 106 * 5, "the views of a sample differ too"
    other = make_views(seed=1)
    assert not any(np.array_equal(other[n].boxes, boxes[n]) for n in range(53))


def test_no_masks_before_their_epoch(make_views):
    maker = make_views(masks={"ratios": (0.3,), "spreads": (0.1,), "start_epoch": 1})
    assert not any(maker[n].masks.any() for n in range(53))
    assert all(maker[n].masks.any() for n in range(53, 106))
    earlier = make_views(masks={"ratios": (0.3,), "spreads": (0.1,)})
    assert np.array_equal(maker[60].masks, earlier[60].masks)
    assert np.array_equal(maker[5].boxes, earlier[5].boxes)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(make_views, workers):
    maker, sampler = make_views(), MicroBatches((4, 7), 12, 6, 0, 1)
    alone, helped = (
        list(build_loader(maker, sampler, LoaderConfig(shards=("",), workers=count), pin=False))
        for count in (0, workers)
    )
    assert len(alone) == len(helped) == len(sampler) == 6
    assert all(equal_batches(a, b) for a, b in zip(alone, helped, strict=True))
    by_hand = [collate([maker[n] for n in range(start, start + 6)]) for start in range(48, 84, 6)]
    assert all(equal_batches(a, b) for a, b in zip(alone, by_hand, strict=True))


def test_threads_change_nothing(make_views):
    maker = make_views()
    alone = [maker[n] for n in range(6)]
    before = torch.get_num_threads(), cv2.getNumThreads()
    try:
        torch.set_num_threads(3)
        cv2.setNumThreads(3)
        assert all(equal(maker[n], made) for n, made in enumerate(alone))
    finally:
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])


def digest(samples: list[Views]) -> str:
    """Of rows, boxes, masks and all other numbers of a step, whatever the order of its samples."""
    total = hashlib.sha256()
    # a step that reaches into the next epoch may hold a row twice
    for made in sorted(samples, key=lambda made: (made.row, made.boxes.tobytes())):
        for name in FIELDS:
            total.update(np.ascontiguousarray(getattr(made, name)).tobytes())
    return total.hexdigest()


@pytest.mark.parametrize("step", [0, 3, 4])  # 53 samples: step 4 reaches into the second epoch
def test_a_step_is_the_same_on_any_number_of_processes(make_views, step):
    digests = set()
    for ranks in (1, 2, 3, 6):
        samples = []
        for rank in range(ranks):
            maker = make_views()
            sampler = MicroBatches((step, step + 1), 12, 2, rank, ranks)
            samples += [maker[position] for positions in sampler for position in positions]
        assert len(samples) == 12
        digests.add(digest(samples))
    assert len(digests) == 1


def by_step(maker: ViewMaker, steps: tuple[int, int], ranks: int, workers: int) -> list[str]:
    """Digest of (rows, boxes, masks) of each global step of 24, made by the loaders of all ranks, two at a time."""
    found: list[list[bytes]] = [[] for _ in range(*steps)]
    for rank in range(ranks):
        sampler = MicroBatches(steps, 24, 2, rank, ranks)
        loader = build_loader(maker, sampler, LoaderConfig(shards=("",), workers=workers), pin=False)
        for number, batch in enumerate(loader):
            for b in range(batch.size):
                sample = (batch.rows[b], batch.boxes[:, b], batch.masks[:, b])
                found[number // (12 // ranks)].append(b"".join(part.numpy().tobytes() for part in sample))
    return [hashlib.sha256(b"".join(sorted(samples))).hexdigest() for samples in found]


def test_rows_boxes_and_masks_of_a_step_on_any_layout_and_after_restarts(make_views):
    maker = make_views(lanes=12)
    whole = by_step(maker, (0, 3), 1, 0)
    assert len(set(whole)) == 3
    for ranks, workers in itertools.product((1, 2, 3, 4), (0, 1, 2)):
        assert by_step(maker, (0, 3), ranks, workers) == whole, (ranks, workers)
    # 53 samples are 2.2 steps an epoch: stopped and continued twice in it, each time on another layout
    first, second, third = (
        by_step(make_views(lanes=12), (step, step + 1), *layout) for step, layout in enumerate([(2, 1), (3, 0), (1, 2)])
    )
    assert first + second + third == whole


def test_steps_differ(make_views):
    maker = make_views()
    steps = [[maker[n] for n in range(12 * step, 12 * step + 12)] for step in range(6)]
    assert len({digest(samples) for samples in steps}) == 6


@pytest.mark.parametrize("ranks, micro", [(1, 12), (1, 4), (2, 6), (2, 2), (3, 4), (4, 1)])
def test_micro_batches_cover_the_steps_in_order(ranks, micro):
    samplers = [MicroBatches((3, 6), 12, micro, rank, ranks) for rank in range(ranks)]
    for rank, sampler in enumerate(samplers):
        found = list(sampler)
        assert {len(batch) for batch in found} == {micro}
        assert len(found) == len(sampler) == 3 * 12 // ranks // micro
        assert list(itertools.chain(*found)) == list(range(36 + rank, 72, ranks))
    # a run that is continued at step 5 gets what the other one gets there
    for rank, sampler in enumerate(samplers):
        later = list(MicroBatches((5, 6), 12, micro, rank, ranks))
        assert later == list(sampler)[-len(later) :]


@pytest.mark.parametrize(
    "batch, per_device, ranks, size",
    [(1024, 128, 1, 128), (1024, 128, 8, 128), (1024, 128, 64, 16), (96, 40, 1, 32), (98, 40, 2, 7), (6, 100, 2, 3)],
)
def test_micro_batch_is_the_largest_divisor(batch, per_device, ranks, size):
    config = LoaderConfig(shards=("",), batch=batch, batch_per_device=per_device)
    share = batch // ranks
    assert max(n for n in range(1, per_device + 1) if share % n == 0) == size
    assert micro_batch(config, ranks) == size


def test_collate_is_view_major_and_lists_the_masked_places(make_views):
    maker = make_views()
    samples = [maker[n] for n in range(9)]
    counts = itertools.cycle([0, 1, 2, 32, 7])  # patches of a mask, none and all included
    for b, made in enumerate(samples):
        flat = np.stack([np.random.default_rng(b).permutation(32) < next(counts) for _ in range(2)])
        samples[b] = dataclasses.replace(made, masks=flat.reshape(2, 8, 4))
    batch = collate(samples)
    assert batch.size == 9
    assert batch.rows.tolist() == [made.row for made in samples]
    assert batch.replaced.tolist() == [-1] * 9
    for name in FIELDS[2:]:
        stacked = getattr(batch, name)
        for b, made in enumerate(samples):
            for v, value in enumerate(getattr(made, name)):
                assert np.array_equal(stacked[v, b].numpy(), value), name
    places, weights = [], []
    for v in range(2):
        for b, made in enumerate(samples):
            hidden = [(r, c) for r in range(8) for c in range(4) if made.masks[v, r, c]]
            places += [((v * 9 + b) * 8 + r) * 4 + c for r, c in hidden]
            weights += [1 / max(1, len(hidden))] * len(hidden)
    assert batch.masked.tolist() == places
    assert batch.mask_weights.tolist() == pytest.approx(weights)
    assert batch.mask_weights.dtype == torch.float32
    masked_views = sum(bool(made.masks[v].any()) for v in range(2) for made in samples)
    assert masked_views == 14
    assert batch.mask_weights.sum().item() == pytest.approx(masked_views, rel=1e-5)


def test_collate_without_any_mask(make_batch):
    batch = make_batch(3, masks={"ratios": (0.0,), "spreads": (0.0,)})
    assert batch.masked.shape == batch.mask_weights.shape == (0,)
    assert batch.masked.dtype == torch.int64


def test_of_a_batch_what_is_computed_with_moves(make_batch):
    batch = make_batch(2)
    moved = batch.to(torch.device("meta"))
    there = {field.name for field in dataclasses.fields(Batch) if getattr(moved, field.name).is_meta}
    assert there == {"global_crops", "local_crops", "masks", "masked", "mask_weights"}
    assert equal_batches(batch, dataclasses.replace(moved, **{name: getattr(batch, name) for name in there}))
    assert equal_batches(batch, batch.to(torch.device("cpu")))
