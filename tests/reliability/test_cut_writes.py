"""R9, one file at a time: a writing is cut off in the middle, as a full disk does it; what was there before stays.

A limit on the size of files does it in this very process; the disks of test_full_disk.py are slower.
"""

import functools
import io
import random
from pathlib import Path

import full_disks
import numpy as np
import pytest
import small
import torch
from PIL import Image

from finetune import gallery_files
from finetune.gallery_files import Columns
from finetune.vector_index import VectorIndex
from pretrain import checkpoint
from recipes.errors import UserError
from recipes.lines import Lines
from recipes.whole import write_json
from shards.embeddings import EmbeddingTable, Keys
from shards.images import ImagesConfig
from shards.packing import PackingConfig
from shards.schema import Record
from shards.writer import pack


def limits(size: int) -> list[int]:
    """Sizes of a file at which its writing is cut."""
    return sorted({0, 1, size // 3, size - 1})


def cut(act, limit: int) -> None:
    """Do it with files of at most `limit` bytes; it must fail, and say so."""
    with full_disks.files_of_at_most(limit), pytest.raises((OSError, UserError), match=r"too large|ulimit|faiss"):
        act()


def rows(count: int) -> np.ndarray:
    values = np.random.default_rng(count).standard_normal((count, 16)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


@pytest.mark.row("R9")
def test_an_exported_model_stays_until_the_next_one_is_whole(tmp_path, figures):
    folder, tensors = tmp_path / "model", {"weight": torch.arange(3000.0)}
    checkpoint.save_model(folder, tensors, {"kind": "old"})
    tried = limits((folder / checkpoint.WEIGHTS).stat().st_size)
    for limit in tried:
        cut(lambda: checkpoint.save_model(folder, {"weight": torch.ones(3000)}, {"kind": "new"}), limit)
        kept, config = checkpoint.load_model(folder)
        assert config["kind"] == "old"
        torch.testing.assert_close(kept["weight"], tensors["weight"], rtol=0, atol=0)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
    figures("R9", injected="export of a model cut off", times=len(tried), lost=0, wrong=0)


@pytest.mark.row("R9")
def test_a_table_of_embeddings_stays_until_the_next_one_is_whole(tmp_path, figures):
    labels = np.arange(200), np.zeros(200, np.int64)
    EmbeddingTable(rows(200), *labels, Keys([f"key {i}" for i in range(200)])).save(tmp_path / "table")
    new = EmbeddingTable(rows(200) * 2, *labels, Keys([f"new {i}" for i in range(200)]))
    tried = limits((tmp_path / "table" / "features.npy").stat().st_size)
    for limit in tried:
        cut(lambda: new.save(tmp_path / "table"), limit)
        kept = EmbeddingTable.load(tmp_path / "table")
        np.testing.assert_array_equal(kept.features, rows(200))
        assert kept.keys[7] == "key 7"
    figures("R9", injected="table of embeddings cut off", times=len(tried), lost=0, wrong=0)


def replace_gallery(folder: Path, count: int) -> None:
    """Make a gallery of `count` images the one that counts."""
    with gallery_files.writing(folder):
        number = gallery_files.read_gallery(folder)["generation"] if (folder / gallery_files.FACTS).exists() else 0
        gallery_files.fresh(folder, number + 1)
        ids = np.arange(count)
        columns = Columns(ids, ids, ids, ids, Keys([f"{i}.jpg" for i in ids]))
        facts = {"generation": number, "factory": "Flat", "dim": 16}
        gallery_files.commit(folder, facts, columns, VectorIndex.build("Flat", ids, rows(count)))


@pytest.mark.row("R9")
def test_a_gallery_stays_until_the_next_generation_is_whole(tmp_path, figures):
    folder = tmp_path / "gallery"
    replace_gallery(folder, 100)
    tried = limits((gallery_files.generation(folder, 1) / gallery_files.INDEX).stat().st_size)
    for limit in [300, *tried[2:]]:  # below, not even the lock can be signed
        cut(lambda: replace_gallery(folder, 150), limit)
        facts, columns, index = gallery_files.load(folder)
        assert (facts["images"], len(columns.ids)) == (100, 100)
        assert index.search(rows(100)[:5], 1, None)[1][:, 0].tolist() == [0, 1, 2, 3, 4]
        left = sorted(path.name for path in folder.iterdir())
        assert left == [".lock", "gallery.json", "generation-000001"], "the room that was missing is free again"
    replace_gallery(folder, 150)
    assert gallery_files.load(folder)[0]["images"] == 150
    figures("R9", injected="gallery cut off", times=len(tried) - 1, lost=0, wrong=0)


def noise(number: int) -> bytes:
    """A JPEG that is another one for each number."""
    pixels, buffer = np.random.default_rng(number).integers(0, 256, (64, 32, 3), np.uint8), io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.row("R9")
def test_packing_goes_on_when_there_is_room_again(tmp_path, figures):
    records = [Record(f"{i:03}", "train", functools.partial(noise, i)) for i in range(12)]
    settings = PackingConfig(shard_samples=4, workers=1), ImagesConfig(), [{"name": "made"}]
    pack(records, tmp_path / "whole", *settings)
    size = max(path.stat().st_size for path in (tmp_path / "whole").glob("*.tar"))
    for limit in (700, size // 2, size - 1):
        cut(lambda: pack(records, tmp_path / "set", *settings), limit)
        left = [path.name for path in (tmp_path / "set.partial").rglob("*") if path.suffix[1:].isdigit()]
        assert not left, "half a tar takes no room"
    pack(records, tmp_path / "set", *settings)
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "set" / path.name).read_bytes() == path.read_bytes()
    figures("R9", injected="packing cut off", times=3, lost=0, wrong=0)


@pytest.mark.row("R9")
def test_lines_wait_for_room_and_none_is_half_written(tmp_path, capsys, figures):
    lines, path, draw = Lines(tmp_path / "metrics.jsonl"), tmp_path / "metrics.jsonl", random.Random(0)
    expected, refused = [], 0
    for step in range(300):
        line = b'{"step": %d, "more": "%s"}\n' % (step, b"x" * draw.randrange(60))
        expected.append(line)
        room = draw.choice([0, 1, 7, 40, 10_000])
        with full_disks.files_of_at_most((path.stat().st_size if step else 0) + room):
            lines.add(line)
        refused += bool(lines.waiting)
        written = path.read_bytes()
        assert written == b"".join(expected)[: len(written)]
        assert written.endswith(b"\n") or not written
    lines.flush()
    with full_disks.files_of_at_most(0):
        lines.add(b'{"step": 300}\n')
        with pytest.raises(UserError, match=r"1 entries of .*metrics\.jsonl could not be written \(File too large\)"):
            lines.close()
    lines.close()
    assert path.read_bytes() == b"".join(expected) + b'{"step": 300}\n'
    told = capsys.readouterr().err.count("metrics.jsonl cannot be written")
    assert 0 < told < refused, "once an outage"
    figures("R9", injected="line of metrics.jsonl cut off", times=refused, lost=0, wrong=0)


@pytest.mark.row("R9")
def test_a_small_file_stays_until_the_next_one_is_whole(tmp_path):
    write_json(tmp_path / "best.json", {"mAP": 0.5})
    for limit in range(12):
        cut(lambda: write_json(tmp_path / "best.json", {"mAP": 0.75}), limit)
        assert small.json_of(tmp_path / "best.json") == {"mAP": 0.5}
    assert [path.name for path in tmp_path.iterdir()] == ["best.json"]
