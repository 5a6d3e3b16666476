"""Prototypes as clusters of patches: the head from stored tensors, the choice and the best patches by hand."""

import pytest
import torch

from pretrain.heads import Head, HeadsConfig, logits
from pretrain.token_clusters import assign, brightness, clusters, head_from
from recipes.errors import UserError


def head(shared: bool = True, layers: int = 3, fixed: bool = False) -> Head:
    torch.manual_seed(5)
    sizes = {"out_dim": 40, "hidden_dim": 24, "bottleneck_dim": 8, "layers": layers, "norm_last_layer": fixed}
    return Head(16, HeadsConfig(shared=shared, **sizes)).eval()


@pytest.mark.parametrize("given", [{}, {"shared": False}, {"layers": 1}, {"layers": 2, "fixed": True}])
def test_a_stored_head_chooses_as_the_one_that_was_stored(given):
    own = head(**given)
    patches = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = logits(own.bottleneck(patches), own.prototypes()[1])
    found = head_from(own.state_dict(), "a run")
    chosen, values = assign(found, patches)
    assert chosen.shape == (3, 5)
    assert torch.equal(chosen, expected.argmax(-1))
    assert torch.equal(values, expected.amax(-1))
    assert not any(parameter.requires_grad for parameter in found.parameters())


def test_patches_have_their_own_prototypes_where_these_are_not_shared():
    own = head(shared=False)
    patches = torch.randn(50, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        of_cls = logits(own.bottleneck(patches), own.prototypes()[0]).argmax(-1)
    assert not torch.equal(assign(head_from(own.state_dict(), "x"), patches)[0], of_cls)


@pytest.mark.parametrize("damage", ["mlp.0.weight", "mlp.2.bias", "last_layer.weight_v", "last_layer.weight_g", "more"])
def test_what_is_no_such_head_is_refused(damage):
    tensors = head().state_dict()
    if damage == "more":
        tensors["mlp.1.running_mean"] = torch.zeros(24)
    else:
        del tensors[damage]
    with pytest.raises(UserError, match=r"the projection head of runs/x is not one of DINO or iBOT \(.+\)"):
        head_from(tensors, "runs/x")


def test_brightness_is_the_mean_of_the_largest_channel():
    images = torch.zeros(1, 4, 6, 3, dtype=torch.uint8)
    images[0, :2, :2] = torch.tensor([10, 50, 20], dtype=torch.uint8)  # patch 0
    images[0, 2, 4] = torch.tensor([200, 0, 0], dtype=torch.uint8)  # one pixel of four of patch 5
    assert brightness(images, 2).tolist() == [[50, 0, 0, 0, 0, 50]]


def test_the_fullest_clusters_and_their_best_patches_by_hand():
    chosen = torch.tensor([[3, 3, 1, 7], [3, 1, 1, 7], [3, 7, 2, 2]])
    values = torch.tensor([[0.5, 0.9, 0.1, 0.3], [0.7, 0.2, 0.2, 0.4], [0.9, 0.8, 0.9, 0.9]])
    bright = torch.full((3, 4), 100.0)
    bright[2, 2:] = torch.tensor([40.0, 40.1])  # up to 40 is black
    one, three, seven, two = 1, 3, 7, 2
    found = clusters(chosen, values, bright, 4, 2)
    assert [cluster.prototype for cluster in found] == [three, one, seven, two]
    assert [(cluster.patches, cluster.images) for cluster in found] == [(4, 3), (3, 2), (3, 3), (1, 1)]
    places = [[(image, patch) for image, patch, _ in cluster.best] for cluster in found]
    # one patch an image, the highest logit first; of equal ones the earlier image, then the earlier patch
    assert places == [[(0, 1), (2, 0)], [(1, 1), (0, 2)], [(2, 1), (1, 3)], [(2, 3)]]
    assert [value for _, _, value in found[0].best] == pytest.approx([0.9, 0.9])
    assert len(clusters(chosen, values, bright, 2, 9)) == 2
    assert len(clusters(chosen, values, bright, 1, 9)[0].best) == 3


def test_black_images_have_no_clusters():
    assert clusters(torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3), torch.zeros(2, 3), 5, 5) == []
