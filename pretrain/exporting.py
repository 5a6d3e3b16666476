"""Models out: for timm, for loaders of DINO's and iBOT's files, as a folder in the layout of the Hugging Face Hub."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pretrain import checkpoint
from pretrain.backbone import Backbone
from pretrain.foreign import Found
from recipes.errors import UserError
from recipes.record import RECIPE
from recipes.whole import write_text

CARD = """---
library_name: timm
pipeline_tag: image-feature-extraction
tags: [person-re-identification, self-supervised, vision-transformer]
---
# {title}

A Vision Transformer whose CLS token describes a person crop of {height} x {width} pixels (height x width): similar
vectors, similar people.

| | |
|---|---|
| architecture | `{architecture}` of timm, patches of {patch} pixels, {dim} numbers a crop |
{facts}
| normalisation | mean {mean}, std {std} of R, G, B in 0..1 |

## How to load it

```python
import timm, torch

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # or "hf-hub:OWNER/NAME"
crop = timm.data.create_transform(**timm.data.resolve_data_config(model=model))  # from a PIL image
features = torch.nn.functional.normalize(model(crop(image)[None]), dim=-1)  # cosine similarity compares two of them
```

In personssl, `--ckpt FOLDER` of `pretrain/run.py`, `finetune/run.py` and `finetune/eval.py` takes the folder as it is.

## Intended use and limits

For research on person re-identification: to be fine-tuned with identities, or to compare features of crops of one
camera network. It was not trained to identify people by name, knows nothing about a scene outside of the crop, and may
work less well for people, clothes, cameras and light that its training images lack. Whoever applies it to people needs
a legal basis for it, and must measure its errors on their own images first.

## Licence

The code that made it is under Apache-2.0. The weights come from images of people, and the terms of these data sets
reach further: LUPerson, Market-1501, MSMT17 and others are for research only. State the licence of the weights before
you publish this folder; none is stated here.
"""


def resized(arguments: dict[str, Any], size: list[int] | None) -> dict[str, Any]:
    """timm arguments for images of another height and width; None: as it is. UserError where patches do not tile it."""
    if size is None:
        return arguments
    if any(side < 1 or side % arguments["patch_size"] for side in size):
        raise UserError(
            f"--size {size[0]} {size[1]}: both must be multiples of the patch, {arguments['patch_size']} pixels"
        )
    return {**arguments, "img_size": list(size)}


def head_of(source: str, found: Found | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Projection head and centres ("cls", "patches") of a run folder, or of a training file. UserError without them."""
    if found is not None:
        if not found.head or "cls" not in found.centres:
            raise UserError(f"--head: {source} holds no projection head with its centre")
        return found.head, found.centres
    state = checkpoint.newest_sound(Path(source) / "checkpoints")
    if state is None:
        raise UserError(f"--head: {source} is no run folder with checkpoints; an exported teacher has no head")
    tensors, _ = checkpoint.read_state(state)
    part = "teacher.head."
    head = {key.removeprefix(part): value for key, value in tensors.items() if key.startswith(part)}
    names = {kind: f"centres.{kind}.centre" for kind in ("cls", "patches")}
    return head, {kind: tensors[name] for kind, name in names.items() if name in tensors}


def trained_on(source: str) -> str:
    """Names of the sets in the recipe of a run of ours, without their folders; a sentence where it does not tell."""
    for folder in (Path(source), *Path(source).parents):
        if (folder / RECIPE).is_file():
            try:
                recipe = yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8"))
                sets = recipe.get("loader", recipe.get("benchmark", {}))["shards"]
                names = [sets] if isinstance(sets, str) else list(sets)
            except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError):  # not one of ours, or damaged
                break
            return ", ".join(str(name).rstrip("/").rpartition("/")[2] for name in names)
    return "not recorded here"


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Where to write a file that gets its name when it is whole; UserError where the disk does not take it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.tmp")
    try:
        yield draft
        os.replace(draft, path)
    except (RuntimeError, SafetensorError) as error:  # torch and safetensors hide the system's error in their own
        told = str(error).splitlines()[0]
        if not any(mark in told for mark in ("inline_container", "iostream error", "os error")):
            raise
        raise UserError(f"{path} could not be written ({told}); make room there, or choose another --out") from error
    finally:
        draft.unlink(missing_ok=True)  # only there when the lines above failed


def _plain_vit(backbone: Backbone, target: str) -> dict[str, Tensor]:
    """The weights, contiguous on the host. UserError for what timm has no model for."""
    if backbone.arguments.get("stem", "patch") != "patch":
        raise UserError(f"--to {target}: timm has no ViT with the ICS stem; --to dino or --to ours keep it")
    return weights(backbone)


def weights(backbone: Backbone) -> dict[str, Tensor]:
    """The state dict by timm's names, contiguous on the host."""
    return {name: value.detach().cpu().contiguous() for name, value in backbone.vit.state_dict().items()}


def to_timm(folder: Path, backbone: Backbone) -> str:
    """Write FOLDER/timm.safetensors; returns the line that loads it."""
    tensors = _plain_vit(backbone, "timm")
    with _whole(folder / "timm.safetensors") as draft:
        save_file(tensors, draft, metadata={"format": "pt"})
    arguments = {key: value for key, value in backbone.arguments.items() if key != "model_name"}
    given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    path = str(folder / "timm.safetensors")
    return f"timm.create_model({backbone.arguments['model_name']!r}, {given}, checkpoint_path={path!r})"


def to_dino(folder: Path, backbone: Backbone, head: dict[str, Tensor], centres: dict[str, Tensor]) -> str:
    """Write FOLDER/backbone.pth with bare keys, or with a head FOLDER/checkpoint.pth; returns what it holds.

    head: state dict of heads.Head, {} for the backbone alone. centres: "cls" [K] and with the MIM term "patches" [K].
    The second file is laid out as DINO's, with the MIM term as iBOT's: a `teacher` with `backbone.*` and `head.*`, and
    the centres of the loss. UserError for a model with parts that DINO's ViT has not.
    """
    tensors = weights(backbone)
    extra = [name for name in tensors if name == "reg_token" or name.endswith("ls1.gamma")]
    if extra or backbone.vit.norm_pre.state_dict():
        raise UserError(f"--to dino: the ViT of DINO has no {(extra or ['norm_pre'])[0]}; use --to timm or --to hub")
    if not head:
        with _whole(folder / "backbone.pth") as draft:
            torch.save(tensors, draft)
        return f"{folder / 'backbone.pth'}: the keys of DINO's backbone, bare"
    head = {name: value.detach().cpu().contiguous() for name, value in head.items()}
    mim = "patches" in centres
    if mim and "last_layer2.weight_v" not in head:  # iBOT names shared prototypes twice
        head |= {name.replace("last_layer.", "last_layer2."): head[name] for name in head if "last_layer." in name}
    teacher = {f"backbone.{name}": value for name, value in tensors.items()}
    teacher |= {f"head.{name}": value for name, value in head.items()}
    loss = {"center": centres["cls"].cpu()[None]} | ({"center2": centres["patches"].cpu()[None, None]} if mim else {})
    with _whole(folder / "checkpoint.pth") as draft:
        torch.save({"teacher": teacher, "ibot_loss" if mim else "dino_loss": loss}, draft)
    return f"{folder / 'checkpoint.pth'}: `teacher` with backbone.* and head.*, {'ibot' if mim else 'dino'}_loss"


def to_hub(folder: Path, backbone: Backbone, config: dict[str, Any], trained_on: str) -> str:
    """Write model.safetensors, config.json and README.md as timm keeps them on the Hub; returns the line that loads it.

    config: of the exported model, for normalisation, samples, epochs and source. trained_on: for the card.
    """
    tensors = _plain_vit(backbone, "hub")
    arguments = dict(backbone.arguments)
    name, (height, width) = arguments.pop("model_name"), arguments["img_size"]
    if "normalize" not in config:
        raise UserError(
            "--to hub: the source does not tell mean and std of its images; say --normalize imagenet or halves"
        )
    normalize = config["normalize"]
    cfg = {
        **{"tag": "personssl", "custom_load": False, "input_size": [3, height, width], "fixed_input_size": False},
        # the test views here: squeezed to the size, nothing cut off
        **{"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash", **normalize},
        **{"num_classes": 0, "pool_size": None, "first_conv": "patch_embed.proj", "classifier": "head"},
    }
    facts = {"architecture": name, "num_classes": 0, "num_features": backbone.dim, "global_pool": "token"}
    arguments.pop("num_classes")
    with _whole(folder / "model.safetensors") as draft:
        save_file(tensors, draft, metadata={"format": "pt"})
    text = json.dumps({**facts, "model_args": arguments, "pretrained_cfg": cfg}, indent=2)
    write_text(folder / "config.json", text + "\n")
    lines = {"trained on": trained_on, "samples seen": config.get("samples"), "epochs": config.get("epochs")}
    lines |= {"came from": config.get("source"), "seed": config.get("seed")}
    card = CARD.format(
        **{"title": folder.name, "height": height, "width": width, "architecture": name, "dim": backbone.dim},
        **{"patch": arguments["patch_size"], "mean": cfg["mean"], "std": cfg["std"]},
        facts="\n".join(f"| {what} | {value} |" for what, value in lines.items() if value is not None),
    )
    write_text(folder / "README.md", card)
    return f"timm.create_model('local-dir:{folder}', pretrained=True)"
