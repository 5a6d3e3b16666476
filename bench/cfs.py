"""Does the catastrophic forgetting score find the people? Half of the images show drawn people, half none.

    python bench/cfs.py                     three seeds, some minutes each on one core

For each seed: draw a mix of figures and textures and, as the target, other figures; pretrain on the mix; go on with the
target (no labels); embed the mix with both models; score; keep half. Each step is the command that a user would run.
`ours` is the share of figures among the kept images, `textbook` that of a random choice of the same size, each the mean
over the seeds; all numbers of each seed are under `seeds`: auc is the probability that a figure scores above a texture.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pairs

from shards import keep_list
from shards.assembly import build_set
from shards.cfs import Scores
from shards.images import ImagesConfig
from shards.packing import PackingConfig
from shards.reader import ShardReader

ROOT = Path(__file__).resolve().parent.parent
FIGURES = {"name": "figures", "role": "unlabeled", "images_per_identity": 3, "cameras": 6, "background": "scenic"}
SIZE = {"height": 64, "width": 32}
PEOPLE = b"s0/"  # of the mix's two sources the first


def run(script: str, *arguments: str | Path) -> None:
    """Run one step as the user would."""
    command = [script, *map(str, arguments)]
    print(f"python {shlex.join(command)}", file=sys.stderr, flush=True)
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}  # the line says one thread
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=sys.stderr, env=environ)


def draw(out: Path, seed: int, images: int, none: int) -> None:
    """The mix of `images` figures and `none` textures, and as many other figures."""
    mixed = {**FIGURES, **SIZE, "seed": seed, "identities": images // 3}
    other = {**mixed, "first_identity": 100_000}
    textures = {"name": "textures", **SIZE, "seed": seed, "count": none}
    packing = PackingConfig(shard_samples=512, workers=1)
    build_set([mixed, textures], out / "mix", packing, ImagesConfig())
    build_set([other], out / "people", packing, ImagesConfig())


def one_seed(out: Path, seed: int, counts: tuple[int, int], more: list[str]) -> dict[str, Any]:
    """All steps of one seed; shares of figures and the seconds that it took. counts: figures, textures."""
    began = time.monotonic()
    draw(out, seed, *counts)
    pretrain, source, target = "pretrain/run.py", out / "source", out / "target"
    recipes = [f"recipes/pretrain/cfs_cpu_{name}.yaml" for name in ("source", "target")]
    run(pretrain, "--recipe", recipes[0], "--out", source, f"loader.shards=[{out / 'mix'}]", f"seed={seed}")
    run(pretrain, "--recipe", recipes[1], "--out", target, "--ckpt", source, f"loader.shards=[{out / 'people'}]",
        f"seed={seed}", *more)  # fmt: skip
    tables = [out / "tables" / name for name in ("source", "target")]
    for ckpt, table in zip((source, target), tables, strict=True):
        run("finetune/embed.py", "--ckpt", ckpt, "--shards", out / "mix", "--out", table, "--workers", "0")
    run("shards/cfs_score.py", *tables, "--out", out / "scores", "--shards", out / "mix")
    half = ["shards/cfs_keep.py", out / "scores", "--fraction", "0.5", "--out"]
    run(*half, out / "keep.npz")
    run(*half, out / "random.npz", "--random", "--seed", str(seed))
    reader, scores = ShardReader([out / "mix"], "unlabeled"), Scores.load(out / "scores")
    people = np.char.startswith(reader.keys, PEOPLE)
    kept, control = (float(people[keep_list.load(out / name, reader)].mean()) for name in ("keep.npz", "random.npz"))
    ranks = np.argsort(np.argsort(scores.values)) + 1  # equal scores hardly occur
    count, others = int(people.sum()), int((~people).sum())
    auc = (ranks[people].sum() - count * (count + 1) / 2) / (count * others)
    medians = {name: float(np.median(scores.values[rows])) for name, rows in (("people", people), ("none", ~people))}
    told = {"kept": kept, "control": control, "auc": float(auc), **{f"median_{k}": v for k, v in medians.items()}}
    rounded = {name: round(value, 4) for name, value in told.items()}
    return {"seed": seed, "images": len(people), **rounded, "seconds": round(time.monotonic() - began)}


def main() -> None:
    """Run the seeds, print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=1500, help="figures in the mix, and in the target")
    parser.add_argument("--textures", type=int, default=1500, help="images without people in the mix")
    parser.add_argument("--out", type=Path, help="folder that keeps everything; default: temporary")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the target's recipe")
    given = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as temporary:
        base = given.out or Path(temporary)
        counts = (given.images, given.textures)
        seeds = [one_seed(base / f"seed{seed}", seed, counts, given.overrides) for seed in given.seeds]
    ours, control = (float(np.mean([each[name] for each in seeds])) for name in ("kept", "control"))
    numbers = {"ratio": round(ours / control, 3), "ours": round(ours, 4), "textbook": round(control, 4)}
    pairs.report("cfs", numbers, "share of people kept", pairs.peak_mb(), 1, seeds=seeds)


if __name__ == "__main__":
    main()
