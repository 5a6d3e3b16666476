"""What a teacher sees, as pictures: attention, principal components, correspondence, token clusters.

    python pretrain/pictures.py runs/vits16 data/market1501 --out pictures/market
    python pretrain/pictures.py runs/vits16/teacher path/to/crops --out pictures/mine --kinds attention components
    python pretrain/pictures.py runs/vits16 data/market1501 --out pictures/fine --size 512 256     finer maps

CKPT is whatever --ckpt of the other scripts takes. IMAGES is a folder of images, or packed sets; of sets with
identities pairs of a person are drawn. Token clusters need the projection head: there CKPT must be the run folder of a
pretraining, or a training file of iBOT. Writes attention.png, components.png, correspondence.png, clusters.png and
numbers.json. docs/pictures.md tells how to read them.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np

from pretrain import comparing, looking, mosaics, processes
from pretrain.chosen_crops import Crops, open_crops, people, shuffled, sound
from pretrain.grids import encoded, write_file
from pretrain.looking import Eye, Seen
from pretrain.opened_teacher import Opened, open_teacher
from recipes.errors import UserError, plain_errors
from recipes.record import environment, write_json

KINDS = ("attention", "components", "correspondence", "clusters")
MATCHED = 128  # images at most on which the matching accuracy is counted


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ckpt", metavar="CKPT", help="run folder, teacher, fine-tuned model, a file of others")
    parser.add_argument("sources", metavar="IMAGES", nargs="+", help="folder of images, packed sets, or SOURCE:PATH")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for the pictures and numbers.json")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, metavar="KIND", help=f"of {', '.join(KINDS)}; default: all"
    )
    parser.add_argument("--images", type=int, default=8, help="that are drawn; default: 8")
    parser.add_argument(
        "--pool", type=int, default=512, help=f"for the clusters, and up to {MATCHED} for the matching; default: 512"
    )
    parser.add_argument("--seed", type=int, default=0, help="which images, which views; default: 0")
    parser.add_argument("--heads", type=int, nargs="+", metavar="N", help="of the attention, from 1; default: all")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="of the images; default: of the model")
    parser.add_argument("--splits", nargs="+", metavar="SPLIT", help="of the sets; default: all")
    parser.add_argument("--mutual", action="store_true", help="correspondence: only patches that choose each other")
    given = parser.parse_args()
    for name, most in (("images", 100), ("pool", 1_000_000)):
        if not 1 <= getattr(given, name) <= most:
            raise UserError(f"--{name} {getattr(given, name)}: it must be 1 to {most:,}")
    if given.seed < 0:
        raise UserError(f"--seed {given.seed}: it counts from 0")
    if given.out.exists() and not given.out.is_dir():
        raise UserError(f"--out {given.out} is a file; the pictures go into a folder")
    return given


def heads_of(given: argparse.Namespace, count: int) -> list[int] | None:
    """--heads counted from 0; UserError where the model has fewer."""
    for head in given.heads or ():
        if not 1 <= head <= count:
            raise UserError(f"--heads {head}: this model has the heads 1 to {count}")
    return None if given.heads is None else [head - 1 for head in given.heads]


def chosen(crops: Crops, given: argparse.Namespace) -> tuple[list[tuple[int, int]], dict[int, np.ndarray]]:
    """Pairs of rows of a person, and the images to draw: those of the pairs first, then others."""
    pairs = people(crops, given.images // 2, given.seed)
    rows = dict.fromkeys([*itertools.chain(*pairs), *shuffled(crops, given.images, given.seed)])
    images = sound(crops, rows, given.images)
    return [pair for pair in pairs if images.keys() >= set(pair)], images


def draw(given: argparse.Namespace, opened: Opened, eye: Eye, crops: Crops) -> dict[str, Seen]:
    """The pictures by their names; without a head no clusters, or a UserError where these were asked for."""
    kinds = given.kinds or [kind for kind in KINDS if kind != "clusters" or opened.head is not None]
    if "clusters" in kinds and opened.head is None:
        raise UserError(f"--kinds clusters needs a projection head: {opened.headless}")
    heads = heads_of(given, opened.backbone.vit.blocks[-1].attn.num_heads)
    pairs, images = chosen(crops, given)
    looked, made = eye.look_at(images), dict[str, Seen]()
    if "attention" in kinds:
        made["attention"] = looking.attention(looked, heads)
    if "components" in kinds:
        made["components"] = looking.components(looked)
    if "correspondence" in kinds:
        rows = dict.fromkeys([*images, *shuffled(crops, given.pool, given.seed)])
        many = sound(crops, rows, max(len(images), min(given.pool, MATCHED)))
        drawn = comparing.people_pairs(looked, pairs, crops.camids, given.mutual)
        shown = given.images // 2 if drawn else given.images
        made["correspondence"] = comparing.correspondence(eye, many, shown, given.seed, drawn, given.mutual, False)
    if "clusters" in kinds:
        made["clusters"] = mosaics.clusters(
            eye, opened.head, crops, shuffled(crops, given.pool, given.seed)[: given.pool]
        )
    return made


def main() -> None:
    """Entry point."""
    given = arguments()
    accelerator = processes.start("no")
    if not accelerator.is_main_process:  # one process is enough: the images are few
        return
    opened, crops = open_teacher(given.ckpt, given.size), open_crops(given.sources, given.splits)
    size = tuple(opened.backbone.arguments["img_size"])
    print(f"{opened.told}; images of {size[0]} x {size[1]} pixels out of {len(crops):,} of {crops.told}")
    eye = Eye(opened.backbone.to(accelerator.device), opened.mean, opened.std, size)
    if opened.head is not None:
        opened.head.to(accelerator.device)
    made = draw(given, opened, eye, crops)
    for kind, seen in made.items():
        write_file(given.out / f"{kind}.png", encoded(seen.image))
        print(f"{given.out / kind}.png: {seen.sentence}")
    if "clusters" not in made and not given.kinds:
        print(f"no clusters.png: {opened.headless}")
    facts = {"ckpt": given.ckpt, "opened": opened.told, "images": crops.told, "size": size, "grid": eye.grid}
    numbers = {kind: seen.numbers | {"sentence": seen.sentence} for kind, seen in made.items()}
    write_json(given.out / "numbers.json", facts | {"seed": given.seed} | numbers | {"environment": environment()})


if __name__ == "__main__":
    with plain_errors():
        main()
