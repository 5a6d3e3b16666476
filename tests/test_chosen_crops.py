"""Which images pictures are drawn of."""

import numpy as np
import pytest
from conftest import encoded

from pretrain.chosen_crops import SPARE, Crops, of_reader, open_crops, people, readable, shuffled, sound
from recipes.errors import UserError
from shards.schema import UNKNOWN, BadSample


def made(pids, camids=None, shard_sizes=None, bad=()) -> Crops:
    """Images of one pixel whose value is their row; the rows in `bad` are damaged."""

    def read(row: int) -> np.ndarray:
        if row in bad:
            raise BadSample(f"image {row} is damaged")
        return np.full((1, 1, 3), row, np.uint8)

    pids = np.array(pids)
    camids = np.full(len(pids), UNKNOWN) if camids is None else np.array(camids)
    return Crops("the images", read, pids, camids, shard_sizes)


@pytest.fixture
def folder(tmp_path):
    """Three images in two folders, beside what is none."""
    (tmp_path / "more").mkdir()
    for number, name in enumerate(("b.jpg", "more/a.JPG", "c.jpeg")):
        (tmp_path / name).write_bytes(encoded(number))
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.jpg").write_bytes(b"")
    return tmp_path


def test_a_folder_is_searched_for_images(folder):
    crops = open_crops([str(folder)])
    assert len(crops) == 3
    assert (crops.pids == UNKNOWN).all()
    assert [crops.read(row).shape for row in range(3)] == [(72, 36, 3)] * 3
    assert len(open_crops([str(folder / "b.jpg")])) == 1


def test_sets_come_with_their_labels(small_set):
    crops = open_crops([str(small_set)])
    assert len(crops) == 53 + 5 + 7
    assert len(open_crops([str(small_set), str(small_set)], ["query"])) == 10
    assert crops.pids.max() == 57
    assert crops.shard_sizes is None, "it lies here"


def test_labels_need_not_be_read(train_reader):
    crops = of_reader(train_reader, "the training set", labels=False)
    assert (crops.pids == UNKNOWN).all()
    assert np.array_equal(crops.read(3), of_reader(train_reader, "x").read(3))


def test_what_is_not_there_is_told(folder, tmp_path, small_set):
    with pytest.raises(UserError, match="nowhere does not exist; give a folder of images, a packed set or SOURCE:PATH"):
        open_crops([str(folder / "nowhere")])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="empty holds no images"):
        open_crops([str(empty)])
    with pytest.raises(UserError, match="is no packed set; give one folder of images, or packed sets only"):
        open_crops([str(small_set), str(folder)])
    with pytest.raises(UserError, match="--splits is for packed sets"):
        open_crops([str(folder)], ["train"])


def test_a_vanished_or_damaged_file_is_a_bad_sample(folder):
    crops = open_crops([str(folder)])
    (folder / "b.jpg").unlink()
    (folder / "c.jpeg").write_bytes(encoded(2)[:200])
    for row in (0, 1):
        with pytest.raises(BadSample):
            crops.read(row)
    assert list(sound(crops, range(3), 3)) == [2]


def test_rows_by_chance_follow_from_the_seed():
    crops = made([UNKNOWN] * 1000)
    one = shuffled(crops, 100, 0)
    assert one == shuffled(crops, 100, 0) != shuffled(crops, 100, 1)
    assert len(set(one)) == 100 + SPARE
    assert np.mean(one) == pytest.approx(500, abs=75)  # 3 standard deviations of the mean of so many
    assert sorted(shuffled(made([UNKNOWN] * 20), 100, 0)) == list(range(20))


def test_few_shards_are_fetched():
    sizes = np.array([300, 50, 200, 400, 350])
    rows = shuffled(made([UNKNOWN] * 1300, shard_sizes=sizes), 100, 3)
    shards = set(np.searchsorted(np.cumsum(sizes), rows, side="right"))
    assert len(rows) == len(set(rows)) == 100 + SPARE
    assert len(shards) <= 2
    others = [shuffled(made([UNKNOWN] * 1300, shard_sizes=sizes), 100, seed)[0] // 300 for seed in range(20)]
    assert len(set(others)) > 2, "not always the same shard"


def test_damaged_images_are_passed_over():
    crops = made([UNKNOWN] * 9, bad=(0, 2, 3))
    assert [int(image[0, 0, 0]) for image in sound(crops, range(9), 3).values()] == [1, 4, 5]
    assert list(sound(crops, range(4), 3)) == [1]
    assert [row for row, _ in readable(crops, range(9))] == [1, 4, 5, 6, 7, 8]
    with pytest.raises(UserError, match="no image of the images can be read: image 3 is damaged"):
        sound(crops, (2, 3), 2)
    with pytest.raises(UserError, match="no image of the images can be read: there are none"):
        sound(made([]), [], 2)


def test_pairs_are_of_a_person_and_of_two_cameras_where_there_are_two():
    pids = [-1, -1, 0, 0, 1, 1, 1, 2, 3, 3, 4, 4, UNKNOWN, UNKNOWN]
    cams = [0, 1, 0, 1, 0, 0, 1, 0, 5, 5, UNKNOWN, 2, 0, 1]
    crops = made(pids, cams)
    for seed in range(10):
        pairs = people(crops, 9, seed)
        by_person = {pids[first]: {first, second} for first, second in pairs}
        assert by_person.keys() == {1, 3, 4}, "no junk, no distractor, nobody seen once, nobody unknown"
        assert all(pids[first] == pids[second] and first != second for first, second in pairs)
        assert 6 in by_person[1], "the only image of the other camera"
        assert pairs == people(crops, 9, seed)
    assert len({people(crops, 1, seed)[0] for seed in range(20)}) > 3
    assert people(crops, 0, 0) == people(made([UNKNOWN] * 4), 3, 0) == []
