"""Files as each version of this project that wrote them left them; spelled out here, so that a change of the code that
reads or writes today's does not change them.

A version that changes a format adds the old one here.
"""

import io
import json
import tarfile
import zlib
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from safetensors.torch import load_file, save_file

IMAGES = 3  # of the sets, tables and galleries here
UNKNOWN_TO_1 = ("spikes",)  # parts of a training state that format 1 did not have
LABELS = {"pids": np.arange(1, IMAGES + 1), "camids": np.arange(IMAGES) % 2}
KEYS = [f"person/{number}" for number in range(IMAGES)]


def features(dtype: str = "float32") -> np.ndarray:
    """What the tables and galleries hold: [IMAGES, 4]."""
    return np.eye(IMAGES, 4).astype(dtype)


def _json(path: Path, tree: Any, indent: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, indent=indent) + "\n")


def state_1(state: Path, without: tuple[str, ...] = UNKNOWN_TO_1) -> None:
    """Make a training state of format 1 out of one of format 2: state.json beside the tensors, and no sums.

    without: parts that it does not have; the first releases did not have "skipped".
    """
    facts = json.loads((state / "manifest.json").read_text())
    (state / "manifest.json").unlink()
    tensors = load_file(state / "tensors.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if name.partition(".")[0] not in without}
    save_file(kept, state / "tensors.safetensors")
    told = {name: facts[name] for name in ("epoch", "step") if name in facts}  # of a fine-tune
    _json(state / "state.json", {**told, "format_version": 1, "samples": facts["samples"]}, indent=1)


def model_1(folder: Path, first: bool = False) -> None:
    """Make an exported model as it was before its files had sums. first: as of the first release, whose models did not
    tell the number of cameras and how images are made smaller."""
    config = json.loads((folder / "config.json").read_text())
    del config["files"]
    if first:
        config.pop("cameras", None)
        config.get("augment", {}).pop("test_kernel", None)
    _json(folder / "config.json", {"format_version": 1, **config}, indent=1)


def table_0(folder: Path) -> Path:
    """A table of embeddings of the first release: keys.json, no table.json."""
    folder.mkdir(parents=True)
    for name, column in {"features": features(), **LABELS}.items():
        np.save(folder / f"{name}.npy", column)
    _json(folder / "keys.json", KEYS)
    return folder


def table_1(folder: Path, dtype: str = "float32") -> Path:
    """A table of embeddings."""
    folder.mkdir(parents=True)
    for name, column in {"features": features(dtype), **LABELS, "keys": np.array(KEYS, "S")}.items():
        np.save(folder / f"{name}.npy", column)
    _json(folder / "table.json", {"format_version": 1, "rows": IMAGES, "dim": 4, "dtype": dtype, "facts": {"made": 1}})
    return folder


def scores_1(folder: Path) -> Path:
    """Scores of cfs_score.py."""
    folder.mkdir(parents=True)
    np.save(folder / "scores.npy", np.linspace(0, 1, IMAGES))
    np.save(folder / "keys.npy", np.array(KEYS, "S"))
    _json(folder / "scores.json", {"format_version": 1, "rows": IMAGES, "facts": {"set": None}})
    return folder


def gallery_1(folder: Path) -> Path:
    """A gallery of one generation."""
    here = folder / "generation-000001"
    here.mkdir(parents=True)
    columns = {"ids": np.arange(IMAGES), "sources": np.zeros(IMAGES, np.int64), **LABELS, "keys": np.array(KEYS, "S")}
    for name, column in columns.items():
        np.save(here / f"{name}.npy", column)
    index = faiss.IndexIDMap2(faiss.index_factory(4, "Flat", faiss.METRIC_INNER_PRODUCT))
    index.add_with_ids(features(), np.arange(IMAGES))
    faiss.write_index(index, str(here / "index.faiss"))
    model = {"ckpt": "runs/x", "fingerprint": "0" * 64, "flip": False, "precision": "no"}
    facts = {"generation": 1, "images": IMAGES, "dim": 4, "next_id": IMAGES, "factory": "Flat", "nprobe": 0}
    facts |= {"vectors": False, "recall": None, "trained_on": IMAGES, "calibration": None, "sources": ["x"]}
    _json(folder / "gallery.json", {"format_version": 1, "facts": facts | {"model": model, "skipped": 0, "removed": 0}})
    return folder


def set_(folder: Path, version: int) -> Path:
    """A packed set of format 1 (the manifest knows nothing of its index) or 2."""
    folder.mkdir(parents=True)
    fields = "shard <u4, offset <u8, length <u4, crc <u4, meta_offset <u8, meta_length <u4, meta_crc <u4, pid <i8"
    kinds = [tuple(field.split()) for field in f"{fields}, camid <i4, key S8".split(", ")]
    rows, tar_path = np.zeros(IMAGES, kinds), folder / "train-000000.tar"
    with tarfile.open(tar_path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for place, key in enumerate(KEYS):
            image, meta = image_of(place), json.dumps({"pid": place + 1, "camid": place % 2}).encode()
            cells = [0]
            for suffix, data in (("jpg", image), ("json", meta)):
                cells += [tar.offset + 512, len(data), zlib.crc32(data)]
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            rows[place] = (*cells, place + 1, place % 2, key.encode())
    np.save(folder / "index-train.npy", rows)
    index = (folder / "index-train.npy").read_bytes()
    sums = {"index_size": len(index), "index_crc32": zlib.crc32(index)} if version > 1 else {}
    whole = tar_path.read_bytes()
    entry = {"name": tar_path.name, "split": "train", "samples": IMAGES, "size": len(whole), "crc32": zlib.crc32(whole)}
    splits = {"train": {"images": IMAGES, "identities": IMAGES, "cameras": 2, **sums}}
    about = {"format_version": version, "sources": [{"name": "made"}], "packing": {"plan": "0" * 64, "seed": 0}}
    _json(folder / "manifest.json", {**about, "splits": splits, "shards": [entry], "skipped": 0}, indent=2)
    return folder


def image_of(number: int) -> bytes:
    """What the sets hold in the place of an image."""
    return b"\xff\xd8" + bytes([number]) * (100 + number)
