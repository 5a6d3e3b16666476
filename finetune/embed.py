"""Embed every image of a shard set: one feature a row of the set, in its order, as a table on disk.

    python finetune/embed.py --ckpt runs/source --shards data/luperson --out tables/source
    accelerate launch --config_file recipes/accelerate/gpu8.yaml finetune/embed.py --ckpt ...     on several GPUs
    python finetune/embed.py --ckpt runs/market --shards data/market --splits query gallery --out tables/market

--ckpt takes what a pretraining or a fine-tune wrote: a run folder, its `teacher`, one of its `teachers`, its `model`. A
teacher gives its CLS token after the last norm, a fine-tuned model its retrieval feature; both L2-normalised. Images
are resized to the size of the model and normalised as in its training, nothing is augmented.

The same command goes on after a kill. What comes out does not depend on the number of processes.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from finetune import models
from finetune.augment import Augment, AugmentConfig
from finetune.features import BATCH, TestViews, embed_spans
from pretrain import processes
from recipes.arguments import positive
from recipes.errors import UserError, plain_errors
from recipes.progress import Meter
from shards.embedding_parts import Parts
from shards.embeddings import Keys
from shards.reader import ShardReader
from shards.schema import SPLITS


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="run folder, model folder, a file of others or timm:NAME")
    parser.add_argument("--shards", required=True, action="append", help="shard set; give it again for more sets")
    parser.add_argument("--splits", nargs="+", default=["unlabeled"], choices=SPLITS, help="default: unlabeled")
    parser.add_argument("--out", required=True, type=Path, help="folder of the table")
    parser.add_argument("--half", action="store_true", help="store float16: half the space, 3 digits")
    parser.add_argument("--precision", default="bf16", choices=("no", "bf16"), help="of the network; default: bf16")
    parser.add_argument("--batch", type=positive, default=BATCH, help=f"images a forward pass; default: {BATCH}")
    parser.add_argument("--chunk", type=positive, default=8192, help="images between two saves; default: 8192")
    parser.add_argument("--workers", type=int, default=2, help="loader processes of each process; default: 2")
    return parser.parse_args()


def facts(
    given: argparse.Namespace, reader: ShardReader, model: torch.nn.Module, augment: AugmentConfig
) -> dict[str, Any]:
    """What tells this table from every other."""
    return {
        "set": reader.identity,
        "model": models.fingerprint(model),
        "ckpt": given.ckpt,
        "input": {name: getattr(augment, name) for name in ("height", "width", "mean", "std")},
        "precision": given.precision,
        "batch": given.batch,
    }


def main() -> None:
    """Entry point."""
    given = arguments()
    accelerator = processes.start(given.precision)
    main_process = accelerator.is_main_process
    reader = ShardReader(given.shards, given.splits)
    if not len(reader):
        raise UserError(f"the splits {', '.join(given.splits)} of {', '.join(given.shards)} hold no images")
    model, augment = models.load_stored(given.ckpt)
    told = facts(given, reader, model, augment)
    parts = Parts(given.out, len(reader), given.chunk, "float16" if given.half else "float32", told)
    if parts.complete():
        accelerator.print(f"{given.out} already holds this table; nothing to do")
        return
    if main_process:
        parts.begin()
    accelerator.wait_for_everyone()
    rank, ranks = accelerator.process_index, accelerator.num_processes
    missing, done = parts.share(rank, ranks)
    spans = [parts.span(number) for number in missing]
    total = done + sum(map(len, spans))
    if done and main_process:
        print(f"going on: {done:,} of the {total:,} images of this process are embedded")
    label = "embed" if ranks == 1 else f"embed (process 1 of {ranks})"
    views = TestViews(reader, Augment(augment))
    with Meter(total, label, start=done, silent=not main_process) as meter:
        blocks = embed_spans(model.to(accelerator.device), views, spans, accelerator, given.workers, meter, given.batch)
        for number, block in zip(missing, blocks, strict=True):
            parts.save(number, block)
    accelerator.wait_for_everyone()
    if main_process:
        parts.join(reader.pids, reader.camids, Keys(reader.keys))
        print(f"{len(reader):,} images embedded: {given.out}")
    processes.end(accelerator)


if __name__ == "__main__":
    with plain_errors():
        main()
