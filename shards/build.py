"""Pack images into webdataset tars with an index and a manifest: python shards/build.py --help"""

import argparse
import json
import re
import sys
import time
from pathlib import Path

from recipes.errors import UserError, plain_errors
from recipes.load import load, recipe_path
from shards.assembly import BuildConfig, build_set
from shards.assembly import configure as configure_sources
from shards.in_place import index_in_place
from shards.published import sentences
from shards.schema import Manifest

EXAMPLES = """
examples:
  a folder of crops without labels, to pretrain on
    python shards/build.py folder:crops --out sets/crops

  Market-1501 with its splits, identities and cameras
    python shards/build.py market1501:Market-1501-v15.09.15 --out sets/market

  the training images of two sets and a folder, without labels, 256 pixels high, on 8 processes
    python shards/build.py market1501:market cuhk03_np:cuhk03 folder:crops --out sets/pretrain \\
        'packing.splits=[train, unlabeled]' packing.drop_labels=true images.max_height=256 packing.workers=8

  a folder that also holds other files; images that are damaged are left out and listed in skipped.txt
    python shards/build.py folder:crops --out sets/crops 'source.suffixes=[jpg, png]' images.on_bad=skip

  tars that others made, used where they lie: only an index is written
    python shards/build.py --in-place downloads/laion/{00000..00127}.tar s3://bucket/more/ --out sets/laion

  everything from a recipe
    python shards/build.py --recipe recipes/shards/market1501.yaml --out sets/market

A run that was interrupted continues with the same command. Without --recipe, the recipe is recipes/shards/SOURCE.yaml
if there is one for the first source, and its `sources:` are replaced by those given here.
"""
OVERRIDE = re.compile(r"[a-z_]\w*(\.\w+)*=", re.IGNORECASE)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Command line; `given` holds sources and overrides in one list."""
    parser = argparse.ArgumentParser(
        "shards/build.py",
        description="Pack images into webdataset tars with an index and a manifest.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "given",
        nargs="*",
        metavar="SOURCE[:PATH] | section.key=value",
        help="a file in shards/sources by its name and the folder that it reads; and settings of the recipe",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the set; it must not exist or be this very set"
    )
    parser.add_argument("--recipe", help="YAML with the sections sources, packing, images")
    parser.add_argument(
        "--in-place",
        action="store_true",
        help="what is given are tars, folders of tars or URLs of tars: index them and copy nothing",
    )
    return parser.parse_intermixed_args(arguments)


def configure(given: list[str], recipe: str | None) -> BuildConfig:
    """Recipe, sources and overrides -> config."""
    overrides = [text for text in given if OVERRIDE.match(text)]
    named = [text.partition(":") for text in given if not OVERRIDE.match(text)]
    if named:
        mappings = [{"name": name} | ({"path": path} if path else {}) for name, _, path in named]
        overrides.append(f"sources={json.dumps(mappings, ensure_ascii=False)}")
    if recipe is None:
        if not named:
            raise UserError("nothing to pack: name a source, for example folder:crops, or give --recipe")
        own = f"shards/{named[0][0]}.yaml"
        recipe = own if recipe_path(own).is_file() else "shards/folder.yaml"
    return load(BuildConfig, recipe, overrides)


def table(manifest: Manifest, seconds: float) -> str:
    """What was packed, one line a split."""
    lines = [f"{'split':<10} {'images':>10} {'identities':>10} {'cameras':>8} {'shards':>7} {'bytes':>15}"]
    for split, count in manifest.splits.items():
        ours = [entry for entry in manifest.shards if entry.split == split]
        size = sum(entry.size for entry in ours)
        lines.append(
            f"{split:<10} {count.images:>10,} {count.identities:>10,} {count.cameras:>8} {len(ours):>7} {size:>15,}"
        )
    images = sum(count.images for count in manifest.splits.values())
    size = sum(entry.size for entry in manifest.shards)
    lines.append(f"{'all':<10} {images:>10,} {'':>10} {'':>8} {len(manifest.shards):>7} {size:>15,}  {seconds:.1f} s")
    if manifest.skipped:
        lines.append(f"{manifest.skipped:,} images could not be read and were left out; skipped.txt names them")
    return "\n".join(lines)


def index_tars(given: list[str], out: Path) -> Manifest:
    """Tars by path, folder or URL, and settings -> a set that refers to them."""
    overrides = [text for text in given if OVERRIDE.match(text)]
    config = load(BuildConfig, "shards/folder.yaml", overrides)
    if config.images.max_height is not None or config.packing.drop_labels:
        raise UserError(
            "--in-place changes no bytes: images.max_height and packing.drop_labels need the tars packed anew"
        )
    split = config.source.get("split", "unlabeled")
    places = [text for text in given if not OVERRIDE.match(text)]
    return index_in_place(places, out, split, config.packing.workers, config.images.on_bad)


def main(arguments: list[str]) -> int:
    """Pack and print what was packed."""
    options = parse(arguments)
    began, notes = time.monotonic(), []
    try:
        if options.in_place:
            manifest = index_tars(options.given, options.out)
        else:
            config = configure(options.given, options.recipe)
            manifest = build_set(config.sources, options.out, config.packing, config.images, config.source)
            if len(config.sources) == 1 and not config.packing.drop_labels and config.packing.splits is None:
                notes = sentences(*configure_sources(config.sources, config.source)[0], manifest)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues", file=sys.stderr)
        return 130
    print("\n".join([table(manifest, time.monotonic() - began), *notes]))
    return 0


if __name__ == "__main__":
    with plain_errors():
        sys.exit(main(sys.argv[1:]))
