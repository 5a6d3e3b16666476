"""Checkpoints of other projects, and our own, from one layout to another: python pretrain/convert.py --help"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from pretrain import checkpoint, exporting, foreign
from pretrain.backbone import Backbone
from pretrain.config import PretrainConfig
from pretrain.foreign_styles import HALVES, IMAGENET
from pretrain.recipe_from import recipe_text
from recipes.errors import UserError, plain_errors
from recipes.load import load

EXAMPLES = """
what a file holds, which of it would be taken and what would be left out; nothing is written:
  python pretrain/convert.py checkpoint0220.pth

a recipe from the arguments that DINO, iBOT, PersonViT, TransReID-SSL and PASS store in their training files:
  python pretrain/convert.py --recipe-from checkpoint0220.pth > mine.yaml

an ImageNet model of DINO (224 x 224) for person crops, as --ckpt of pretrain/run.py and finetune/run.py (both also take
the file itself; its backbone alone, without its head, only comes out here):
  python pretrain/convert.py dino_deitsmall16_pretrain.pth --size 256 128 --out teachers/dino

our teacher for others:
  python pretrain/convert.py runs/vits16 --to timm --out exported/timm     timm.create_model(..., checkpoint_path=...)
  python pretrain/convert.py runs/vits16 --to hub --out exported/hub       a folder for the Hugging Face Hub
  python pretrain/convert.py runs/vits16 --to dino --out exported/dino     bare keys for TransReID-SSL, PersonViT, DINO
  python pretrain/convert.py runs/vits16 --to dino --head --out exported/whole      with projection head and centres

SOURCE is a file (.pth, .pt, .bin, .safetensors), a folder as on the Hub, timm:NAME, or of ours a run folder, a teacher
or a fine-tuned model. Nothing in a file is executed. docs/checkpoints.md lists what is read and what is refused.
"""
NORMALIZE = {"imagenet": IMAGENET, "halves": HALVES}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "pretrain/convert.py",
        description="Read a checkpoint, say what it holds, and write it in another layout.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("source", nargs="?", metavar="SOURCE", help="the checkpoint")
    what.add_argument("--recipe-from", metavar="FILE", help="print the recipe that a training file was made with")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write here; a new or empty folder")
    parser.add_argument("--to", choices=("ours", "timm", "dino", "hub"), default="ours", help="layout; default: ours")
    parser.add_argument("--size", nargs=2, type=int, metavar=("H", "W"), help="image size to resize the positions to")
    kernels = ("bilinear", "bicubic")
    parser.add_argument(
        "--positions", choices=kernels, default="bilinear", help="how; default: bilinear, as --ckpt does"
    )
    parser.add_argument(
        "--grid", nargs=2, type=int, metavar=("R", "C"), help="patch grid of the file, if it cannot tell"
    )
    parser.add_argument("--heads", type=int, metavar="N", help="attention heads of the file, if it cannot tell")
    parser.add_argument("--normalize", choices=tuple(NORMALIZE), help="of its images, if it cannot tell; halves: 0.5")
    parser.add_argument("--head", action="store_true", help="with --to dino: projection head and centres as well")
    return parser.parse_args()


def recipe(file: str, given: argparse.Namespace) -> str:
    """The recipe of a training file; it loads, or the error says which argument is to blame."""
    found = foreign.read(file, tuple(given.grid) if given.grid else None, heads=given.heads)
    names = Path(file).name, Path(file).stem
    text = recipe_text(
        found.settings, checkpoint.patch_grid(found.arguments), *names, found.arguments.get("reg_tokens", 0)
    )
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / f"from_{Path(file).stem}.yaml"
        draft.write_text(text)
        load(PretrainConfig, draft)
    return text


def opened(given: argparse.Namespace) -> tuple[Backbone, dict[str, Any], foreign.Found | None]:
    """The backbone in the wanted size, what is known about it, and the file if it is one of another project."""
    source, kernel = given.source, given.positions
    if foreign.is_foreign(source):
        found = foreign.read(source, tuple(given.grid) if given.grid else None, heads=given.heads)
        wanted = exporting.resized(found.arguments, given.size)
        backbone = checkpoint.build_backbone(source, found.tensors, found.arguments, wanted, kernel=kernel)
        report = found.report.resized(checkpoint.patch_grid(found.arguments), backbone.grid, kernel)
        print(report)
        return backbone, found._replace(report=report).config(), found
    if given.grid or given.heads:
        raise UserError(f"--grid and --heads are for files of other projects; {source} tells both")
    stored = checkpoint.load_model(source)[1]
    wanted = exporting.resized(stored["timm"], given.size) if "timm" in stored else None
    backbone, config = checkpoint.load_backbone(source, wanted, kernel=kernel)
    fine_tuned = config.get("kind") == "reid"
    print(f"{source}: {'the backbone of a fine-tuned model' if fine_tuned else 'a teacher'} of ours")
    own = {"normalize": {key: config["augment"][key] for key in ("mean", "std")}} if fine_tuned else {}
    return backbone, config | own, None


def main() -> None:
    """Entry point."""
    given = arguments()
    if given.recipe_from:
        if given.out:
            raise UserError("--recipe-from prints a recipe and writes nothing; leave --out away")
        print(recipe(given.recipe_from, given), end="")
        return
    if given.head and given.to != "dino":
        raise UserError("--head belongs to --to dino: the other layouts hold the backbone alone")
    if given.out and given.out.exists() and (not given.out.is_dir() or any(given.out.iterdir())):
        raise UserError(f"--out {given.out} exists and is no empty folder; nothing is overwritten, choose another")
    backbone, config, found = opened(given)
    if given.normalize:
        config = {**config, "normalize": NORMALIZE[given.normalize]}
    print(f"  model      {', '.join(f'{key}={value}' for key, value in backbone.arguments.items())}")
    if not given.out:
        return
    if given.to == "ours":
        facts = {
            key: value for key, value in config.items() if key in ("normalize", "samples", "epochs", "seed", "source")
        }
        checkpoint.save_teacher(given.out, backbone, facts)
        told = f"--ckpt {given.out}"
    elif given.to == "timm":
        told = exporting.to_timm(given.out, backbone)
    elif given.to == "dino":
        told = exporting.to_dino(
            given.out, backbone, *(exporting.head_of(given.source, found) if given.head else ({}, {}))
        )
    else:
        told = exporting.to_hub(given.out, backbone, config, exporting.trained_on(given.source))
    print(f"  written    {told}")


if __name__ == "__main__":
    with plain_errors():
        main()
