"""Principal components of patch tokens against numpy, and their colours by hand."""

import numpy as np
import pytest
import torch

from pretrain.components import colours, principal


def tokens(seed: int = 0, images: int = 3, patches: int = 20, dim: int = 7) -> torch.Tensor:
    scales = torch.tensor([5.0, 3, 2, 1, 0.5, 0.3, 0.1])[:dim]
    return torch.randn(images, patches, dim, generator=torch.Generator().manual_seed(seed)) * scales + 4


def test_values_and_shares_are_those_of_a_singular_value_decomposition():
    given = tokens()
    found = principal(given)
    flat = given.double().numpy().reshape(60, 7)
    u, s, vt = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    assert found.shares.tolist() == pytest.approx((s**2 / (s**2).sum())[:3])
    for component in range(3):
        values, expected = found.values[..., component].numpy().ravel(), u[:, component] * s[component]
        sign = np.sign(vt[component][np.abs(vt[component]).argmax()])
        assert values == pytest.approx(sign * expected)


def test_order_and_sign_follow_from_the_tokens():
    given = tokens(1)
    one, other = principal(given), principal(-given)
    assert torch.allclose(one.values, -other.values), "the axes keep their direction, so the values change theirs"
    assert torch.equal(one.values, principal(given.clone()).values)
    assert one.shares.tolist() == sorted(one.shares.tolist(), reverse=True)


def test_the_share_between_images_by_hand():
    places, images = torch.tensor([-1.0, 1.0]), torch.tensor([-3.0, 3.0])
    given = torch.zeros(2, 2, 4)
    given[..., 0], given[..., 1] = images[:, None], places[None]  # variance 9 between the images, 1 between the places
    found = principal(given)
    assert found.between == pytest.approx(0.9)
    assert found.shares.tolist() == pytest.approx([0.9, 0.1, 0])
    assert found.values[..., 0].tolist() == [[-3, -3], [3, 3]]


def test_equal_tokens_and_few_dimensions_are_no_errors():
    flat = principal(torch.ones(2, 5, 4))
    assert flat.shares.tolist() == [0, 0, 0]
    assert flat.between == 0
    assert (colours(flat.values) == 128).all()
    narrow = principal(tokens(dim=2))
    assert narrow.values.shape == (3, 20, 3)
    assert (narrow.values[..., 2] == 0).all()
    assert float(narrow.shares.sum()) == pytest.approx(1)


def test_colours_go_from_quantile_to_quantile():
    values = torch.arange(101, dtype=torch.float64)[None, :, None].repeat(1, 1, 2)
    values[..., 1] *= -7
    found = colours(values)[0]
    assert found[0].tolist() == [0, 255]
    assert found[100].tolist() == [255, 0]
    assert found[1].tolist() == [0, 255], "one per cent at either end is cut off"
    assert found[50].tolist() == [128, 128]
    assert found[25, 0] == round(255 * 24 / 98)
