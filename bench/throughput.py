"""From JPEG shards to the optimiser's step: images a second of the whole, of the loader alone, of the step alone.

    python bench/throughput.py                                         drawn people 256 x 128, ViT-S/16, CPU, bf16
    python bench/throughput.py --device cuda --batch 128 --steps 100 --workers 14 --compile --shards data/luperson
    python bench/throughput.py --flat                                  sets of 10,000, 100,000 and 1,000,000 samples

Ours is ShardReader, ViewMaker and DataLoader with worker processes, and the step of pretrain/run.py. The textbook way
is torchvision on PIL images in a DataLoader, file by file (bench/loader.py), and the step of bench/textbook_step. Each
has a process of its own, they take turns, and `ratio` is the time of an image in the textbook's over that in ours.
`data_wait` is the share of the time in which the training process waits for its loader. MFU is told for GPUs whose peak
is known: floating-point operations of our step, as pretrain/cost.py counts them, over the peak.

--flat: does the cost of an image grow with the set? A packed set of a million samples is written (2.7 GB: 64 small
JPEGs again and again, each copy in a place of its own), and sets of its first tars. The samples are read in the
shuffled order from the middle of an epoch on. Here `ours` is an image of the largest set and `textbook` one of the
smallest, so that a ratio of 1.0 means flat; `ready_s` is the time from nothing to the first views. The files were just
written, so most of their bytes are in memory.
"""

import argparse
import contextlib
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import pairs
import torch
from pairs.children import Child
from textbook_step.many import make_sets
from textbook_step.pipelines import OurPipeline, TextbookPipeline, Took, Work

from pretrain import cost
from pretrain.backbone import Backbone, BackboneConfig, timm_arguments
from pretrain.hardware import device_peak
from pretrain.heads import HeadsConfig
from pretrain.masks import MasksConfig
from shards.assembly import build_set
from shards.images import ImagesConfig
from shards.packing import PackingConfig
from shards.reader import ShardReader

FILES = 1024  # JPEGs that the textbook reads
LOADED = 256  # images at least that the loader alone is timed with; with --flat 2,048
SIZES = (10_000, 100_000, 1_000_000)


def flops_per_image(work: Work) -> float:
    """Floating-point operations of our step for an image."""
    config = BackboneConfig(name=work.model)
    with torch.device("meta"):
        backbone = Backbone(timm_arguments(config, work.views.global_size), masked=True, drop_path=config.drop_path)
    backbone.skips_samples = not work.compile
    where = (work.device, torch.bfloat16 if work.bf16 else torch.float32)
    sizes = cost.sizes(backbone, work.views, MasksConfig(), True, where)
    return sum(cost.step_flops(sizes, HeadsConfig(out_dim=work.out_dim)).values())


def draw(folder: Path, count: int) -> None:
    """Pack `count` drawn people of 256 x 128."""
    print(f"drawing {count} people", flush=True)
    source = {"name": "figures", "role": "unlabeled", "identities": count, "images_per_identity": 1}
    build_set([source], folder, PackingConfig(shard_samples=256), ImagesConfig())


def unpack(work: Work) -> None:
    """Some of the samples as files, for the textbook."""
    reader, folder = ShardReader(list(work.sets[0]), work.split), Path(work.files)
    folder.mkdir()
    for number in range(min(FILES, len(reader))):
        (folder / f"{number}.jpg").write_bytes(reader[number * (len(reader) // min(FILES, len(reader)))].image)


def compare(work: Work, rounds: int, steps: int) -> dict[str, Any]:
    """Both pipelines in turns; the numbers of the report."""
    batches = max(steps, -(-LOADED // work.batch))
    whole: dict[str, list[Took]] = {"ours": [], "textbook": []}
    loading: dict[str, list[float]] = {who: [] for who in whole}
    stepping: dict[str, list[float]] = {who: [] for who in whole}
    with contextlib.ExitStack() as stack:
        kinds = {"ours": OurPipeline, "textbook": TextbookPipeline}
        children = {who: stack.enter_context(Child(f"the {who} pipeline", kind, work)) for who, kind in kinds.items()}
        for child in children.values():
            child.wait()
        for _ in range(rounds):
            for who, child in children.items():
                whole[who].append(child.ask("whole", 0, steps))
            for who, child in children.items():
                loading[who].append(child.ask("loading", 0, batches) / batches)
                stepping[who].append(child.ask("stepping", 0, steps) / steps)
        peak = {f"{who}_peak_mb": round(child.ask("peak_mb")) for who, child in children.items()}
    seconds = {who: [pairs.Seconds(took.seconds, took.seconds) for took in whole[who]] for who in whole}
    numbers = pairs.compare(seconds["ours"], seconds["textbook"], 1000 / steps / work.batch)
    del numbers["cpu_ratio"]  # the work is spread over processes
    rate = {who: 1000 / numbers[who] for who in whole}
    peak_flops = device_peak(torch.device(work.device))
    flops = flops_per_image(work)
    return {
        **numbers,
        "images_per_s": {who: round(rate[who], 2) for who in whole},
        "loader_only": {who: round(work.batch / statistics.median(loading[who]), 2) for who in whole},
        "step_only": {who: round(work.batch / statistics.median(stepping[who]), 2) for who in whole},
        "data_wait": {who: round(statistics.median(t.waited / t.seconds for t in whole[who]), 4) for who in whole},
        "gflop_per_image": round(flops / 1e9, 2),
        "mfu": None if peak_flops is None else round(rate["ours"] * flops / peak_flops, 4),
        **peak,
    }


def flat(work: Work, rounds: int, steps: int) -> dict[str, Any]:
    """Ours on sets of several sizes in turns; the numbers of the report."""
    batches = max(steps, -(-8 * LOADED // work.batch))
    whole: dict[int, list[Took]] = {size: [] for size in SIZES}
    loading: dict[int, list[float]] = {size: [] for size in SIZES}
    with Child("our pipeline", OurPipeline, work) as child:
        ready = child.ask("ready")
        for _ in range(rounds):
            for place, size in enumerate(SIZES):
                whole[size].append(child.ask("whole", place, steps))
                loading[size].append(child.ask("loading", place, batches) / batches)
        peak = round(child.ask("peak_mb"))
    seconds = {size: [pairs.Seconds(took.seconds, took.seconds) for took in whole[size]] for size in SIZES}
    numbers = pairs.compare(seconds[SIZES[-1]], seconds[SIZES[0]], 1000 / steps / work.batch)
    del numbers["cpu_ratio"]
    per_image = 1000 / work.batch
    return {
        **numbers,
        "samples": list(SIZES),
        "whole_ms": [round(statistics.median(t.seconds for t in whole[s]) * per_image / steps, 4) for s in SIZES],
        "loader_ms": [round(statistics.median(loading[size]) * per_image, 4) for size in SIZES],
        "loader_ratio": round(statistics.median(loading[SIZES[0]]) / statistics.median(loading[SIZES[-1]]), 3),
        "data_wait": [round(statistics.median(t.waited / t.seconds for t in whole[size]), 4) for size in SIZES],
        "ready_s": [round(seconds, 4) for seconds in ready],
        "ours_peak_mb": peak,
    }


def show(found: dict[str, Any]) -> None:
    """The numbers for people."""
    if "samples" in found:
        columns = zip(*(found[name] for name in ("samples", "whole_ms", "loader_ms", "ready_s")), strict=True)
        for size, whole, loading, ready in columns:
            print(
                f"{size:12,} samples: {whole:9.3f} ms an image, loader alone {loading:7.3f} ms; ready in {ready:.3f} s"
            )
        return
    for who in ("ours", "textbook"):
        print(
            f"{who:10}{found['images_per_s'][who]:10.1f} images/s; loader alone {found['loader_only'][who]:.1f}, step "
            f"alone {found['step_only'][who]:.1f}; waits for data {found['data_wait'][who]:.1%}; "
            f"{found[f'{who}_peak_mb']} MB"
        )
    told = "no peak is known for this device" if found["mfu"] is None else f"MFU {found['mfu']:.1%}"
    print(f"{found['gflop_per_image']} GFLOP an image; {told}")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", nargs="+", help="packed sets or SOURCE:PATH; default: people are drawn")
    parser.add_argument("--split", default="unlabeled", help="of these sets")
    parser.add_argument("--images", type=int, default=1024, help="to draw")
    parser.add_argument("--flat", action="store_true", help="time for an image by the size of the set")
    parser.add_argument("--model", default="vit_small_patch16_224", help="name in timm")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--locals", type=int, default=8, help="local crops of an image")
    parser.add_argument("--out-dim", type=int, default=8192, help="K, prototypes")
    parser.add_argument("--precision", choices=["float32", "bf16"], default="bf16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile, of ours only")
    parser.add_argument("--workers", type=int, help="loader processes; default 1, with a GPU all cores but two")
    parser.add_argument("--prefetch", type=int, default=2, help="batches ahead of each worker")
    parser.add_argument("--steps", type=int, help="timed steps of a turn; default 4, on a GPU 50")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where files go for a while; default: temporary")
    parser.add_argument("--json", type=Path, help="write the line to this file, too")
    given = parser.parse_args()
    cuda = given.device == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    if given.flat and given.shards:
        parser.error("--flat writes its own sets; leave --shards away")
    if given.steps is None:
        given.steps = 50 if cuda else 4
    if given.workers is None:
        given.workers = max(1, (os.cpu_count() or 1) - 2) if cuda else 1
    return given


def main() -> None:
    """Make the set, time, print the line."""
    given = arguments()
    names = ("split", "model", "batch", "locals", "out_dim", "compile", "device", "workers", "prefetch")
    told = {name: getattr(given, name) for name in names}
    with tempfile.TemporaryDirectory(dir=given.folder) as temporary:
        folder = Path(temporary)
        if given.flat:
            sets = make_sets(folder, SIZES)
        elif given.shards:
            sets = [tuple(given.shards)]
        else:
            draw(folder / "set", given.images)
            sets = [(str(folder / "set"),)]
        work = Work(sets=tuple(sets), files=str(folder / "files"), bf16=given.precision == "bf16", **told)
        if given.flat:
            found = flat(work, given.rounds, given.steps)
        else:
            unpack(work)
            found = compare(work, given.rounds, given.steps)
    show(found)
    told |= {"precision": given.precision, "steps": given.steps, "shards": given.shards}
    gpu = torch.cuda.get_device_name() if given.device == "cuda" else None
    place = (torch.get_num_threads(), gpu, given.json)
    name = "flat" if given.flat else "throughput"
    pairs.report(name, found, "ms/image", found["ours_peak_mb"], *place, **told)


if __name__ == "__main__":
    main()
