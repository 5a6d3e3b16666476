"""pretrain/run.py on other data: a folder as it is, a keep-list, damaged shards, the weights of another run."""

import shutil

import numpy as np
import pytest
import small

from shards import keep_list
from shards.reader import ShardReader


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    return small.drawn(tmp_path_factory.mktemp("people"), small.UNLABELED)


def pretrain(out, data, *more) -> int:
    return small.run(small.arguments("pretrain/run.py", out, data, "schedules.epochs=0.25", *more))


def losses(out):
    return [line["loss"] for line in small.metrics(out)]


def test_a_folder_is_trained_on_as_its_packed_set(people, tmp_path):
    reader = ShardReader([people], "unlabeled")
    crops = tmp_path / "crops"
    for row in range(len(reader)):
        path = crops / f"{reader[row].key}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(reader[row].image)
    build = [str(small.ROOT / "shards/build.py"), f"folder:{crops}", "--out", str(tmp_path / "set")]
    assert small.run(build) == 0
    assert pretrain(tmp_path / "packed", tmp_path / "set") == 0
    assert pretrain(tmp_path / "unpacked", f"folder:{crops}") == 0
    assert losses(tmp_path / "packed") == losses(tmp_path / "unpacked")
    assert len(losses(tmp_path / "packed")) == 2


def test_a_keep_list_leaves_the_others_out(people, tmp_path, capsys):
    reader = ShardReader([people], "unlabeled")
    kept = np.arange(0, len(reader), 4)
    keep_list.save(tmp_path / "keep.npz", kept, reader.keys, {"set": reader.identity})
    assert pretrain(tmp_path / "run", people, f"loader.keep={tmp_path / 'keep.npz'}", "schedules.epochs=1") == 0
    assert f"{len(kept)} images, 2 steps of 16" in capsys.readouterr().out
    own = ShardReader([people], "unlabeled", keep=tmp_path / "keep.npz")
    assert [own[row] for row in range(len(own))] == [reader[int(row)] for row in kept]
    assert own.shard_sizes.sum() == len(kept)


def test_damaged_samples_up_to_the_share(people, tmp_path, capsys):
    copy = shutil.copytree(people, tmp_path / "copy")
    tar = sorted(copy.glob("*.tar"))[0]
    data = bytearray(tar.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    tar.write_bytes(data)
    assert pretrain(tmp_path / "few", copy, "loader.max_bad=0.5", "schedules.epochs=1") == 0
    assert small.metrics(tmp_path / "few")[-1]["bad_samples"] > 5
    assert "another sample takes its place" in capsys.readouterr().err
    assert pretrain(tmp_path / "many", copy, "schedules.epochs=1") == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: ")
    assert "more than loader.max_bad = 0.001" in told


def test_a_run_starts_from_another_one(people, tmp_path, capsys):
    assert pretrain(tmp_path / "source", people, "schedules.epochs=1", "schedules.lr=0.016") == 0
    assert pretrain(tmp_path / "fresh", people) == 0
    capsys.readouterr()
    assert pretrain(tmp_path / "target", people, "--ckpt", str(tmp_path / "source")) == 0
    assert f"start: teacher, heads and centres of {tmp_path}/source/checkpoints/" in capsys.readouterr().out
    assert losses(tmp_path / "target")[0] != losses(tmp_path / "fresh")[0]
    assert pretrain(tmp_path / "target", people) == 2, "the folder belongs to a run that started elsewhere"
    assert "ckpt was" in capsys.readouterr().err
