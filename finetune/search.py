"""Make a folder of crops searchable: who is this, and where else?

    python finetune/search.py build path/to/crops --ckpt runs/market --out runs/gallery
    python finetune/search.py query runs/gallery person.jpg                    the ten nearest images
    python finetune/search.py query runs/gallery a.jpg b.jpg --one-person      several images of one person
    python finetune/search.py query runs/gallery folder --json out.json --strips out.png
    python finetune/search.py query runs/gallery --text "a woman in a red coat with a white bag"
    python finetune/search.py add runs/gallery path/to/more                    images that are not in it yet
    python finetune/search.py remove runs/gallery 'path/to/crops/old/*'        by path, key in a set, or pattern
    python finetune/search.py info runs/gallery

Images come from a folder (with all folders below it), an image, a packed set, SOURCE:PATH, or a table of
finetune/embed.py, which uses several GPUs. --ckpt takes what docs/checkpoints.md lists; afterwards the gallery knows
its model, give --ckpt again only where that has moved. Another model is refused. docs/search.md tells more.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from finetune import answers
from finetune.extractor import Extractor, pooled
from finetune.gallery import Gallery
from finetune.gallery_sources import open_source
from recipes.arguments import positive
from recipes.errors import plain_errors
from shards.schema import SPLITS


def arguments() -> argparse.Namespace:
    """The command line."""
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--ckpt", help="run folder, teacher, file of others, timm:NAME; default: the gallery's model")
    model.add_argument("--device", help="cuda, cuda:1, cpu; default: the GPU if there is one")
    model.add_argument("--precision", choices=("no", "bf16"), help="of the network; default: bf16 on a GPU, else no")
    model.add_argument("--batch", type=positive, default=64, help="images a forward pass; default: 64")
    images = argparse.ArgumentParser(add_help=False)
    images.add_argument("paths", nargs="+", metavar="PATH", help="folder, image, packed set, SOURCE:PATH or table")
    images.add_argument("--splits", nargs="+", choices=SPLITS, help="of packed sets; default: all")
    place = argparse.ArgumentParser(add_help=False)
    place.add_argument("gallery", type=Path, help="folder of the gallery")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    build = verbs.add_parser("build", parents=[images, model], help="a gallery of images")
    build.add_argument("--out", required=True, type=Path, help="folder of the gallery")
    build.add_argument("--factory", help="index, as of faiss.index_factory; default: Flat, above a million IVF with PQ")
    build.add_argument("--flip", action="store_true", help="mean with the mirrored image, also of later queries")
    verbs.add_parser("add", parents=[place, images, model], help="images that are not in it yet")
    query = verbs.add_parser("query", parents=[place, images, model], help="the nearest images")
    query.add_argument("--text", action="store_true", help="what is given are sentences, for a model that reads them")
    query.add_argument("--top", type=positive, default=10, help="answers a query; default: 10")
    query.add_argument("--nprobe", type=positive, help="cells of an IVF that are searched; more finds more")
    query.add_argument("--one-person", action="store_true", help="all images are one query: their mean")
    query.add_argument("--json", metavar="FILE", help="write the answers as JSON; - is standard output")
    query.add_argument("--strips", type=Path, metavar="FILE", help="draw the ranked lists as a PNG")
    remove = verbs.add_parser("remove", parents=[place], help="images that are to go")
    remove.add_argument("patterns", nargs="+", metavar="PATTERN", help="path, folder or key, * and ? as in a shell")
    verbs.add_parser("info", parents=[place], help="what the gallery holds, as JSON")
    given = parser.parse_args()
    if given.verb == "build" and not given.ckpt:
        build.error("the following arguments are required: --ckpt")
    return given


def tell(sentence: str) -> None:
    """Beside the answers, which go to standard output."""
    print(sentence, file=sys.stderr, flush=True)


def extractor(given: argparse.Namespace, gallery: Gallery | None = None) -> Extractor:
    """The model that the command line names, or the gallery."""
    settings = given.device, given.precision, given.batch
    if gallery is None:
        return Extractor(given.ckpt, *settings, given.flip)
    stored = gallery.facts["model"]
    found = Extractor(given.ckpt or stored["ckpt"], *settings, stored["input"]["flip"])
    gallery.check(found)
    return found


def build(given: argparse.Namespace) -> None:
    """A new gallery."""
    sources = [open_source(path, given.splits) for path in given.paths]
    gallery = Gallery.build(given.out, extractor(given), sources, given.factory, tell)
    print(*answers.recall_told(gallery), f"{len(gallery):,} images: {given.out}", sep="\n")


def add(given: argparse.Namespace) -> None:
    """More images."""
    gallery = Gallery.load(given.gallery)
    sources = [open_source(path, given.splits) for path in given.paths]
    grown = gallery.add(extractor(given, gallery), sources, tell)
    print(f"{len(grown) - len(gallery):,} images added, now {len(grown):,}: {given.gallery}")


def remove(given: argparse.Namespace) -> None:
    """Fewer images."""
    gallery = Gallery.load(given.gallery)
    gone = np.logical_or.reduce([gallery.called(pattern) for pattern in given.patterns])
    left = gallery.remove(gone)
    print(f"{int(gone.sum()):,} images removed, {len(left):,} left: {given.gallery}")


def query(given: argparse.Namespace) -> None:
    """The nearest images."""
    gallery = Gallery.load(given.gallery)
    model = extractor(given, gallery)
    if given.text:
        queries, features = answers.sentences(model, given.paths, tell)
    else:
        queries, features = answers.queries(model, [open_source(path, given.splits) for path in given.paths], tell)
    if given.one_person:
        queries, features = answers.merged(queries), pooled(features, np.zeros(1, int))
    found = [(name, some) for (name, _), some in
             zip(queries, gallery.search(features, given.top, given.nprobe), strict=True)]  # fmt: skip
    if given.json:
        answers.write_json_answers(given.json, found, gallery)
    else:
        answers.print_tables(found, gallery)
    if given.strips:
        answers.draw(given.strips, queries, found, gallery)
        tell(f"ranked lists: {given.strips}")


def info(given: argparse.Namespace) -> None:
    """What is in it."""
    gallery = Gallery.load(given.gallery)  # a damaged one is told
    print(json.dumps({"gallery": str(given.gallery), **gallery.facts}, indent=1))


def main() -> None:
    """Entry point."""
    given = arguments()
    {"build": build, "add": add, "remove": remove, "query": query, "info": info}[given.verb](given)


if __name__ == "__main__":
    with plain_errors():
        main()
