"""A model for others: an ONNX file, a folder for the Hugging Face Hub, or a foreign fine-tune in our own layout.

    python finetune/export.py --ckpt runs/market --to onnx --out market.onnx
    python finetune/export.py --ckpt runs/market --to onnx --input imagenet --out osnet_x0_25_market.onnx
    python finetune/export.py --ckpt runs/market --to hub --out exported/market
    python finetune/export.py --ckpt transformer_120.pth                          what it holds; nothing is written
    python finetune/export.py --ckpt model_final.pth --to ours --size 384 128 --pooling gem --out models/sbs

--input says how the images come: own (normalised as in the model's training), imagenet (normalised with ImageNet's
mean and std, as BoxMOT and most trackers do), pixels (RGB in 0..255). The file takes any number of images [N, 3, H, W]
and is written only if its features agree with torch's (cosine >= 0.9999 on random and on drawn images).

--streams keeps some of the features of a model that has several (MDPR): a shorter vector to store and to search.

--size, --feature, --pooling, --last-stride, --semantic-weight and --normalize say what the file of another project
does not tell, where its model was not trained as published: docs/checkpoints.md. A teacher goes to the Hub by
pretrain/convert.py.
"""

import argparse
from pathlib import Path
from typing import get_args

import torch

from finetune import hub_folder, models, onnx_export
from finetune.foreign import reid as foreign_reid
from finetune.foreign.draft import Choices
from finetune.methods.base import Method
from finetune.necks import NecksConfig
from finetune.plain_forward import Input
from pretrain import hub
from pretrain.checkpoint import save_model
from pretrain.foreign import is_foreign
from pretrain.foreign_styles import HALVES, IMAGENET
from recipes.errors import UserError, plain_errors

NORMALIZE = {"imagenet": IMAGENET, "halves": HALVES}
POOLINGS = get_args(get_args(NecksConfig.model_fields["pooling"].annotation)[0])


def share(text: str) -> float:
    """A number in 0..1, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number in 0..1")
    return value


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="run folder, model folder, file of others, hub:OWNER/NAME")
    parser.add_argument("--to", choices=("onnx", "hub", "ours"), default="ours", help="default: ours")
    parser.add_argument("--out", type=Path, help="the file (onnx) or a new folder; without it nothing is written")
    parser.add_argument("--input", choices=get_args(Input), default="own", help="of an ONNX file; default: own")
    parser.add_argument("--streams", help="of a model with several features, such as fusion,global: those to keep")
    told = parser.add_argument_group("what a file of another project does not tell")
    told.add_argument("--size", nargs=2, type=int, metavar=("H", "W"), help="of its images in pixels")
    told.add_argument("--feature", choices=("before", "after"), help="the side of the neck that is searched with")
    told.add_argument("--pooling", choices=POOLINGS, help="of the map or the tokens")
    told.add_argument("--last-stride", type=int, choices=(1, 2), help="of a ResNet's last stage")
    told.add_argument("--semantic-weight", type=share, metavar="W", help="of SOLIDER, 0..1; default: 0.2")
    told.add_argument("--normalize", choices=tuple(NORMALIZE), help="of its images; halves: mean and std 0.5")
    return parser.parse_args()


def choices_of(given: argparse.Namespace) -> Choices:
    """The options about another project's file. UserError where the model is none of these."""
    size = None if given.size is None else (given.size[0], given.size[1])
    normalize = None if given.normalize is None else NORMALIZE[given.normalize]
    chosen = Choices(size, given.feature, given.pooling, given.last_stride, given.semantic_weight, normalize)
    if chosen != foreign_reid.AS_PUBLISHED and not (is_foreign(given.ckpt) and Path(given.ckpt).is_file()):
        raise UserError("--size, --feature, --pooling, --last-stride, --semantic-weight and --normalize are for files "
                        f"of other projects; {given.ckpt} is none")  # fmt: skip
    return chosen


def main() -> None:
    """Entry point."""
    given = arguments()
    title = Path(given.ckpt).name
    given.ckpt = hub.local(given.ckpt)
    choices = choices_of(given)
    if given.to == "onnx" and given.out:
        onnx_export.libraries()  # before a model is loaded in vain
        if given.out.is_dir():
            raise UserError(
                f"--out {given.out} is a folder; --to onnx writes a file, such as {given.out / 'model.onnx'}"
            )
    elif given.out and given.out.exists() and (not given.out.is_dir() or any(given.out.iterdir())):
        raise UserError(f"--out {given.out} exists and is no empty folder; nothing is overwritten, choose another")
    found = foreign_reid.read(given.ckpt, choices)
    if found is None and choices != foreign_reid.AS_PUBLISHED:
        raise UserError(f"{given.ckpt} is no model that was fine-tuned for re-identification elsewhere; see "
                        "pretrain/convert.py for its backbone")  # fmt: skip
    if found is not None:
        print(found.report)
    model, augment, stored = models.load_known(given.ckpt, choices)
    if given.streams:
        chosen = [stream.strip() for stream in given.streams.split(",")]
        if not isinstance(model, Method):
            raise UserError(f"--streams is for models fine-tuned here; {given.ckpt} is none")
        model.search_by(chosen)
        stored = {**stored, "method": {**stored["method"], "streams": chosen}}
        stored.pop("calibration", None)  # of another feature
    model.eval()
    with torch.no_grad():
        dim = model.embed(torch.zeros(1, 3, *augment.size)).shape[1]
    told = f"{dim} numbers{model.told_streams if isinstance(model, Method) else ''}"
    print(f"  model      {stored['timm']['model_name']}: {augment.height} x {augment.width} pixels -> {told}")
    if given.to != "onnx" and stored.get("kind") != "reid":
        raise UserError(f"{given.ckpt} was not fine-tuned; --to {given.to} of a teacher: pretrain/convert.py --help")
    if not given.out:
        return
    if given.to == "onnx":
        done = onnx_export.write(given.out, model, augment, stored, title, given.input)
        told = ", ".join(f"{value:.6f} on {kind} images" for kind, value in done.cosine.items())
        print(f"  written    {done.path}: opset {onnx_export.OPSET}, any number of images, input {given.input}")
        print(f"  checked    lowest cosine with torch: {told}")
    elif given.to == "hub":
        hub_folder.write(given.out, model, augment, stored, dim, Path(given.ckpt))
        print(f"  written    --ckpt {given.out}; publish: hf upload OWNER/NAME {given.out}")
    else:
        save_model(given.out, model.state_dict(), dict(stored))
        print(f"  written    --ckpt {given.out}")


if __name__ == "__main__":
    with plain_errors():
        main()
