"""Damaged samples: counted over all processes, tolerated up to a share."""

import pytest

from pretrain.journal import BadSamples
from recipes.errors import UserError


def test_a_share_of_what_was_seen_but_of_an_epoch_at_least():
    bad = BadSamples(0.01, epoch=1000)
    bad.add(10, 64)  # 1 % of an epoch, though much more of what was seen
    with pytest.raises(UserError) as caught:
        bad.add(1, 64)
    assert str(caught.value) == (
        "11 damaged samples among 128: more than loader.max_bad = 0.01 of the 1000 allowed for; see which with "
        "shards/check.py, or raise loader.max_bad"
    )
    later = BadSamples(0.01, epoch=1000)
    later.add(10, 2000)
    later.add(10, 0)
    with pytest.raises(UserError):
        later.add(1, 0)


def test_none_allowed():
    bad = BadSamples(0.0, epoch=100)
    bad.add(0, 50)
    with pytest.raises(UserError):
        bad.add(1, 50)
