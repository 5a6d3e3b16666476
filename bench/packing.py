"""Packing a folder of JPEGs of about 20 kB, byte for byte, against webdataset's own writer in a plain loop.

    python bench/packing.py                      10,000 and 40,000 images; images/s and peak memory of each
    python bench/packing.py --images 10000 200000

The textbook way lists the folder, permutes it, and gives each image (read, decoded to verify it, as ours does) to
webdataset.ShardWriter. Ours runs as a user runs it: one process a core. Memory is the largest sum of resident memory
over the packing process and its children, above what they need to start (`base_mb`).
"""

import argparse
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pairs
import webdataset
from PIL import Image

KINDS = 64  # different images; the others are copies, which no part of the packing can profit from


def draw(folder: Path, count: int) -> None:
    """`count` JPEGs of 160 x 320 pixels, about 20 kB each, in one folder."""
    folder.mkdir()
    made = []
    for number in range(KINDS):
        rng = np.random.default_rng(number)
        rough = rng.integers(0, 256, (80, 40, 3), dtype=np.uint8)
        fine = np.asarray(Image.fromarray(rough).resize((160, 320), Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = np.clip(fine + rng.normal(0, 9, fine.shape), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noisy).save(buffer, "JPEG", quality=85)
        made.append(buffer.getvalue())
    for number in range(count):
        (folder / f"{number:07d}.jpg").write_bytes(made[number % KINDS])


def textbook(folder: Path, out: Path) -> float:
    """Seconds of the plain loop."""
    began = time.perf_counter()
    out.mkdir()
    names = sorted(os.listdir(folder))
    random.Random(0).shuffle(names)
    with webdataset.ShardWriter(str(out / "%06d.tar"), maxcount=4096, verbose=0) as writer:
        for name in names:
            data = (folder / name).read_bytes()
            Image.open(io.BytesIO(data)).convert("RGB")
            writer.write({"__key__": name[:-4], "jpg": data, "json": b"{}"})
    return time.perf_counter() - began


def _resident(process: int) -> int:
    """Bytes resident in a process and its descendants that no other process shares."""
    total = 0
    try:
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Private_Clean", "Private_Dirty")):
                total += int(line.split()[1]) * 1024
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:  # it has ended
        return 0
    return total + sum(_resident(int(child)) for child in children)


def ours(folder: Path, out: Path) -> tuple[float, float]:
    """Seconds and MB of `shards/build.py`."""
    script = Path(__file__).resolve().parent.parent / "shards" / "build.py"
    command = [sys.executable, str(script), f"folder:{folder}", "--out", str(out)]
    began, peak = time.perf_counter(), 0
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ended = threading.Event()
    threading.Thread(target=lambda: (child.wait(), ended.set()), daemon=True).start()
    while not ended.wait(0.2):
        peak = max(peak, _resident(child.pid))
    if child.returncode:
        raise SystemExit(f"error: {' '.join(command)} failed")
    return time.perf_counter() - began, peak / 1e6


def main() -> None:
    """Draw, pack, print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 40_000], help="sizes of the folders")
    parser.add_argument("--folder", type=Path, help="where the images and the sets go for a while; default: temporary")
    given = parser.parse_args()
    cases = {}
    with tempfile.TemporaryDirectory(dir=given.folder) as temporary:
        base = Path(temporary)
        for count in given.images:
            draw(base / "raw", count)
            mean = sum(path.stat().st_size for path in list((base / "raw").iterdir())[:KINDS]) / KINDS
            os.sync()  # what is still to be written of the pictures is not part of the packing
            plain = textbook(base / "raw", base / "plain")
            shutil.rmtree(base / "plain")
            os.sync()
            seconds, peak = ours(base / "raw", base / "set")
            told = json.loads((base / "set" / "manifest.json").read_text())["splits"]["unlabeled"]["images"]
            assert told == count, f"{told} of {count} images packed"
            shutil.rmtree(base / "set")
            shutil.rmtree(base / "raw")
            cases[count] = {
                "ratio": round(plain / seconds, 3),
                "ours": round(count / seconds),
                "textbook": round(count / plain),
                "peak_mb": round(peak),
                "image_kb": round(mean / 1e3, 1),
            }
    first, *others = cases.values()
    more = {str(count): case for count, case in cases.items() if case in others}
    numbers = {name: first[name] for name in ("ratio", "ours", "textbook", "image_kb")}
    pairs.report("packing", numbers, "images/s", first["peak_mb"], os.cpu_count() or 1, **more)


if __name__ == "__main__":
    main()
