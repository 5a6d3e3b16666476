"""Identities of a training split: numbering, limits for few labels, identities that cannot be trained on."""

import numpy as np
import pytest

from finetune.identities import IdentitiesConfig, select_identities
from recipes.errors import UserError
from shards.schema import UNKNOWN


def test_numbering_by_hand():
    chosen = select_identities(IdentitiesConfig(), np.array([7, 0, 3, 7, -1, 3, UNKNOWN, 12, 12]))
    np.testing.assert_array_equal(chosen.rows, [0, 2, 3, 5, 7, 8])
    np.testing.assert_array_equal(chosen.labels, [1, 0, 1, 0, 2, 2])
    np.testing.assert_array_equal(chosen.pids, [3, 7, 12])
    assert (chosen.classes, chosen.ignored, chosen.dropped) == (3, 3, 0)
    assert chosen.labels.dtype == np.int64


def test_limits_are_kept_and_labels_stay_contiguous():
    pids = np.repeat(np.arange(5, 45), 6)
    config = IdentitiesConfig(max_identities=10, images_per_identity=4)
    chosen = select_identities(config, pids)
    np.testing.assert_array_equal(np.bincount(chosen.labels), [4] * 10)
    np.testing.assert_array_equal(chosen.pids[chosen.labels], pids[chosen.rows])
    assert len(set(chosen.rows.tolist())) == 40
    assert (np.diff(chosen.rows) > 0).all()


def test_limit_above_an_identity_takes_all_of_it():
    chosen = select_identities(IdentitiesConfig(images_per_identity=3), np.array([1, 1, 2, 2, 2, 2, 2]))
    np.testing.assert_array_equal(np.bincount(chosen.labels), [2, 3])


def test_a_smaller_study_is_part_of_a_larger_one():
    pids = np.repeat(np.arange(1, 31), 8)

    def study(identities, images, seed=0):
        config = IdentitiesConfig(max_identities=identities, images_per_identity=images, seed=seed)
        return select_identities(config, pids)

    assert set(study(5, 8).pids) < set(study(15, 8).pids)
    assert set(study(30, 2).rows) < set(study(30, 5).rows)
    np.testing.assert_array_equal(study(5, 3).rows, study(5, 3).rows)
    assert set(study(5, 8).pids) != set(study(5, 8, seed=1).pids)


@pytest.mark.parametrize("pids", [[0, -1, UNKNOWN], []])
def test_no_labels(pids):
    with pytest.raises(UserError, match="identity label"):
        select_identities(IdentitiesConfig(), np.array(pids, np.int64))


def test_one_identity_cannot_be_told_apart():
    with pytest.raises(UserError, match=r"one identity only \(4\)"):
        select_identities(IdentitiesConfig(), np.array([4, 4, 0]))


SINGLES = np.array([8, 3, 3, 5, 9, 9, 11])  # 5, 8 and 11 have one image


def test_singletons_are_refused_by_name_and_number():
    with pytest.raises(UserError, match=r"identity 5 has only one.*2 other.*singletons=repeat.*singletons=drop"):
        select_identities(IdentitiesConfig(), SINGLES)


def test_singletons_dropped():
    chosen = select_identities(IdentitiesConfig(singletons="drop"), SINGLES)
    np.testing.assert_array_equal(chosen.pids, [3, 9])
    np.testing.assert_array_equal(chosen.rows, [1, 2, 4, 5])
    assert chosen.dropped == 3


def test_singletons_repeated_stay():
    chosen = select_identities(IdentitiesConfig(singletons="repeat"), SINGLES)
    np.testing.assert_array_equal(chosen.pids, [3, 5, 8, 9, 11])
    assert len(chosen.rows) == 7
    assert chosen.dropped == 0


def test_one_image_an_identity_makes_singletons_of_all():
    pids = np.array([1, 1, 2, 2])
    for singletons in ("error", "drop"):
        config = IdentitiesConfig(images_per_identity=1, singletons=singletons)
        with pytest.raises(UserError, match=r"images_per_identity=1.*set identities\.singletons=repeat") as caught:
            select_identities(config, pids)
        assert "singletons=drop" not in str(caught.value)  # it would leave nobody
    chosen = select_identities(IdentitiesConfig(images_per_identity=1, singletons="repeat"), pids)
    assert chosen.labels.tolist() == [0, 1]


def test_more_identities_than_there_are():
    with pytest.raises(UserError, match=r"max_identities = 9, but .* 3 usable .* at most 3"):
        select_identities(IdentitiesConfig(max_identities=9), np.array([1, 1, 2, 2, 3, 3]))
