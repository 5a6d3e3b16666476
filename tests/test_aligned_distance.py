"""The aligned distance against every path there is, against a cell-by-cell loop, and by hand."""

import itertools
import math

import pytest
import torch

from finetune.aligned_distance import all_elements, diagonal, elements, pairwise, path, shortest


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def paths(rows: int, columns: int):
    """Every way from the first cell to the last one, down or right."""
    for downs in itertools.combinations(range(rows + columns - 2), rows - 1):
        cell, cells = (0, 0), [(0, 0)]
        for step in range(rows + columns - 2):
            cell = (cell[0] + 1, cell[1]) if step in downs else (cell[0], cell[1] + 1)
            cells.append(cell)
        yield cells


def looped(d: torch.Tensor) -> torch.Tensor:
    """Cell by cell."""
    cost = {}
    for i, j in itertools.product(range(d.shape[0]), range(d.shape[1])):
        before = [cost[cell] for cell in ((i - 1, j), (i, j - 1)) if cell in cost]
        cost[i, j] = d[i, j] + (torch.stack(before).min() if before else 0)
    return cost[d.shape[0] - 1, d.shape[1] - 1]


def test_by_hand():
    d = torch.tensor([[0.1, 0.9, 0.9], [0.2, 0.3, 0.9], [0.9, 0.1, 0.2]])
    assert shortest(d).item() == pytest.approx(0.9)  # 0.1 + 0.2 + 0.3 + 0.1 + 0.2
    assert path(d) == [(0, 0), (1, 0), (1, 1), (2, 1), (2, 2)]
    assert diagonal(d).item() == pytest.approx(0.6)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 4), (4, 1), (2, 2), (3, 5), (5, 3), (5, 5)])
def test_no_path_is_cheaper(rows, columns):
    d = drawn(6, rows, columns, seed=rows * 7 + columns).abs()
    costs = [min(sum(one[i, j].item() for i, j in cells) for cells in paths(rows, columns)) for one in d]
    torch.testing.assert_close(shortest(d), torch.tensor(costs))
    for one, cost in zip(d, costs, strict=True):
        cells = path(one)
        assert cells in list(paths(rows, columns))
        assert sum(one[i, j].item() for i, j in cells) == pytest.approx(cost)


@pytest.mark.parametrize(("rows", "columns"), [(5, 5), (3, 7), (16, 16)])
def test_value_and_gradient_are_those_of_the_loop(rows, columns):
    swept = drawn(2, 3, rows, columns, seed=1).abs().requires_grad_()
    cells = swept.detach().clone().requires_grad_()
    weights = drawn(2, 3, seed=2)
    found = shortest(swept)
    assert found.shape == (2, 3)
    (found * weights).sum().backward()
    expected = torch.stack([looped(one) for one in cells.flatten(0, 1)]).view(2, 3)
    (expected * weights).sum().backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(swept.grad, cells.grad)


def test_elements_are_the_published_form_and_do_not_overflow():
    a, b = drawn(4, 5, 6), drawn(4, 7, 6, seed=3)
    x = (a[:, :, None] - b[:, None]).norm(dim=-1)
    torch.testing.assert_close(elements(a, b), (x.exp() - 1) / (x.exp() + 1))
    far = elements(torch.zeros(1, 1), torch.full((1, 1), 200.0))
    assert far.item() == 1.0, "where the published form is inf / inf"


def test_elements_of_equal_stripes_are_zero_and_have_a_gradient():
    a = drawn(3, 4).requires_grad_()
    found = elements(a, a.detach())
    assert (found.diagonal() == 0).all()
    found.sum().backward()
    assert a.grad.isfinite().all()


def test_an_image_is_not_at_zero_from_itself():
    parts = drawn(1, 8, 16)
    own = shortest(elements(parts, parts)).item()
    assert diagonal(elements(parts, parts)).item() == 0
    assert own > 3, "H zeros and H - 1 steps beside the diagonal"


def test_all_pairs_are_those_pairs():
    a, b = drawn(3, 5, 4), drawn(2, 5, 4, seed=1)
    found = all_elements(a, b)
    assert found.shape == (3, 2, 5, 5)
    for i, j in itertools.product(range(3), range(2)):
        torch.testing.assert_close(found[i, j], elements(a[i], b[j]))


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("cells", [1, 70, 1000, 1 << 24])
def test_chunks_change_nothing(aligned, cells):
    a, b = drawn(7, 6, 8), drawn(11, 6, 8, seed=1)
    reduce = shortest if aligned else diagonal
    found = pairwise(a, b, aligned, cells)
    torch.testing.assert_close(found, reduce(all_elements(a, b)), atol=1e-4, rtol=1e-4)
    assert (found - pairwise(a, b, aligned)).abs().max() < 1e-5


def test_a_person_who_stands_lower_is_nearer_than_another_one():
    """The same stripes, two of them cut away above: the path follows them, the diagonal does not."""
    person, other = torch.nn.functional.normalize(drawn(2, 10, 16), dim=-1)
    query, same = person[None, :8], person[None, 2:]
    aligned = [shortest(elements(query, each)).item() for each in (same, other[None, :8])]
    straight = [diagonal(elements(query, each)).item() for each in (same, other[None, :8])]
    assert aligned[0] < 0.8 * aligned[1]
    assert math.isclose(straight[0], straight[1], rel_tol=0.15), "no help for the diagonal"
