"""A sample that cannot be read or decoded: another one in its place, the same one always, and nothing else changes."""

import dataclasses
import re
import shutil
import zlib

import numpy as np
import pytest
import torch

from pretrain import views
from pretrain.batch import Views, collate
from pretrain.loader import LoaderConfig, MicroBatches, ViewMaker, build_loader
from recipes.errors import UserError, plain_errors
from shards.decoding import pixels
from shards.reader import ShardReader
from shards.schema import BadSample
from shards.seeds import generator


def equal(one: Views, other: Views) -> bool:
    return all(np.array_equal(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(Views))


class Damaged:
    """A reader whose rows `bad` are damaged: "read" raises at once, "decode" gives bytes that are no whole image."""

    def __init__(self, reader, bad: set[int], how: str):
        self.reader, self.bad, self.how = reader, bad, how

    def __len__(self):
        return len(self.reader)

    def __getitem__(self, row):
        sample = self.reader[row]
        if row not in self.bad:
            return sample
        if self.how == "read":
            raise BadSample(f"sample {sample.key!r} is damaged")
        return sample._replace(image=sample.image[: len(sample.image) // 2])


def over(maker: ViewMaker, reader) -> ViewMaker:
    """The same views over another reader."""
    return ViewMaker(reader, maker.order, maker.seed, (maker.views, maker.photometric, maker.masks), maker.grid, 4)


@pytest.mark.parametrize("how", ["read", "decode"])
@pytest.mark.row("R7")
def test_a_bad_sample_is_replaced_and_no_other_changes(make_views, train_reader, how):
    maker, bad = make_views(), {3, 17, 40}
    broken = over(maker, Damaged(train_reader, bad, how))
    stand_ins = {}
    for position in range(2 * 53):
        epoch, row = maker.order(position)
        sound, made = maker[position], broken[position]
        if row not in bad:
            assert equal(sound, made)
            continue
        assert made.replaced == row
        assert made.row not in bad
        stand_ins[epoch, row] = made.row
        for name in ("masks", "global_drops", "local_drops"):
            assert np.array_equal(getattr(made, name), getattr(sound, name)), "numbers stay those of its own row"
        image = pixels(train_reader[made.row].image)
        u = generator(0, "views", epoch, row).random((5, 33), dtype=np.float32)[0].tolist()
        assert tuple(made.boxes[0]) == views.draw_box(u, image, False, maker.views)
        assert equal(made, over(maker, Damaged(train_reader, bad, how))[position])
    assert len(stand_ins) == 6
    assert len(set(stand_ins.values())) > 3, "not always the same one"
    batch = collate([broken[n] for n in range(53)])
    assert sorted(batch.replaced[batch.replaced >= 0].tolist()) == sorted(bad)
    assert batch.replaced.dtype == torch.int64


def test_a_replacement_may_be_bad_too(make_views, train_reader):
    maker = make_views()
    sound = {7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 19}
    broken = over(maker, Damaged(train_reader, set(range(53)) - sound, "read"))
    used = [broken[n].row for n in range(53) if maker.order(n)[1] in (1, 2, 3)]
    assert set(used) <= sound


def test_when_all_replacements_are_bad_the_run_ends(make_views, train_reader):
    broken = over(make_views(), Damaged(train_reader, set(range(53)), "decode"))
    with pytest.raises(UserError, match=r"so are all 10 drawn in its place.*shards/check.py.*truncated JPEG"):
        broken[0]


def test_damaged_shards_in_a_worker_are_one_sentence(make_views, small_set, tmp_path, capsys):
    copy = shutil.copytree(small_set, tmp_path / "copy")
    for tar in copy.glob("train-*.tar"):
        tar.write_bytes(bytes(tar.stat().st_size))
    broken = over(make_views(), ShardReader([copy], "train"))
    for workers in (0, 1):
        loader = build_loader(
            broken, MicroBatches((0, 1), 4, 4, 0, 1), LoaderConfig(shards=("",), workers=workers), False
        )
        with pytest.raises(UserError) as caught:
            next(iter(loader))
        # its frames hold the loader in a circle, and a late collection of that would wait five seconds for the worker
        error = caught.value.with_traceback(None)
        del caught
        with pytest.raises(SystemExit), plain_errors():
            raise error
        del error
        told = capsys.readouterr().err
        assert re.fullmatch(r"error: row \d+ of the shard set is damaged.* match the index\n", told)


@pytest.mark.parametrize("crc", ["of the sound bytes", "of the damaged bytes"])
@pytest.mark.row("R7")
def test_a_damaged_image_inside_a_set_is_found(make_views, small_set, tmp_path, crc):
    copy = shutil.copytree(small_set, tmp_path / "copy")
    rows = np.load(copy / "index-train.npy")
    entry = rows[12]
    tar = sorted(copy.glob("train-*.tar"))[int(entry["shard"])]
    data, start, length = bytearray(tar.read_bytes()), int(entry["offset"]), int(entry["length"])
    assert data[start : start + 2] == b"\xff\xd8"
    data[start + length // 2 : start + length] = bytes(length - length // 2)
    tar.write_bytes(data)
    if crc == "of the damaged bytes":
        rows["crc"][12] = zlib.crc32(data[start : start + length])
        np.save(copy / "index-train.npy", rows)
    sound = make_views()
    broken = over(sound, ShardReader([copy], "train"))
    for position in range(53):
        made = broken[position]
        assert made.replaced == (12 if sound.order(position)[1] == 12 else -1)
        assert made.replaced == 12 or equal(made, sound[position])
