"""Triplets on local features: which rows they take, by hand."""

import pytest
import torch

from finetune.aligned_distance import diagonal, elements, shortest
from finetune.local_triplet import LocalTripletConfig, all_local_distances, local_triplet, mined, prepared

LABELS = torch.tensor([0, 0, 0, 1, 1, 2])
DISTANCES = torch.tensor([
    [0.0, 1.0, 2.0, 5.0, 3.0, 9.0],
    [1.0, 0.0, 4.0, 6.0, 7.0, 0.5],
    [2.0, 4.0, 0.0, 8.0, 1.5, 2.5],
    [5.0, 6.0, 8.0, 0.0, 0.1, 7.5],
    [3.0, 7.0, 1.5, 0.1, 0.0, 6.5],
    [9.0, 0.5, 2.5, 7.5, 6.5, 0.0],
])  # fmt: skip


def parts(seed: int = 0) -> torch.Tensor:
    return torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(seed))


def by_hand(rows, positives, negatives, margin, reduce=shortest) -> float:
    gaps = []
    for a, p, n in zip(range(6), positives, negatives, strict=True):
        if p is not None:
            far, near = reduce(elements(rows[a], rows[p])), reduce(elements(rows[a], rows[n]))
            gaps.append(max(0.0, (margin + far - near).item()))
    return sum(gaps) / len(gaps)


def test_the_hardest_rows_of_a_batch():
    found = mined(DISTANCES, LABELS)
    assert found.positive[:5].tolist() == [2, 2, 1, 4, 3]
    assert found.negative.tolist() == [4, 5, 4, 0, 2, 1]
    assert found.counts.tolist() == [True] * 5 + [False], "the last person has one image"


@pytest.mark.parametrize("aligned", [True, False])
def test_the_triplets_are_those_of_the_global_distance(aligned):
    rows, config = parts(), LocalTripletConfig(margin=0.3, aligned=aligned)
    found = local_triplet(rows, LABELS, mined(DISTANCES, LABELS), config)
    expected = by_hand(rows, [2, 2, 1, 4, 3, None], [4, 5, 4, 0, 2, 1], 0.3, shortest if aligned else diagonal)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert expected > 0


def test_its_own_hardest():
    rows, config = parts(1), LocalTripletConfig(margin=0.2, own_hard=True)
    own = all_local_distances(rows, config)
    chosen = mined(own, LABELS)
    positives = [p if c else None for p, c in zip(chosen.positive.tolist(), chosen.counts.tolist(), strict=True)]
    expected = by_hand(rows, positives, chosen.negative.tolist(), 0.2)
    found = local_triplet(rows, LABELS, mined(DISTANCES, LABELS), config)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert found.item() > local_triplet(rows, LABELS, mined(DISTANCES, LABELS), LocalTripletConfig(margin=0.2)).item()


def test_settings():
    rows = parts(2)
    plain, cells = (all_local_distances(rows, LocalTripletConfig(per_cell=per)) for per in (False, True))
    torch.testing.assert_close(cells, plain / 7)
    straight = all_local_distances(rows, LocalTripletConfig(per_cell=True, aligned=False))
    torch.testing.assert_close(straight[0, 1], diagonal(elements(rows[0], rows[1])) / 4)
    assert prepared(5 * rows, LocalTripletConfig(normalize=True)).norm(dim=-1).allclose(torch.ones(6, 4))
    soft = local_triplet(rows, LABELS, mined(DISTANCES, LABELS), LocalTripletConfig(margin=None))
    assert soft > 0


def test_a_batch_without_triplets_is_zero_with_a_gradient():
    rows = parts().requires_grad_()
    labels = torch.zeros(6, dtype=torch.int64)
    loss = local_triplet(rows, labels, mined(DISTANCES, labels), LocalTripletConfig())
    loss.backward()
    assert loss.item() == 0
    assert rows.grad.isfinite().all()
