"""A backbone with everything that pictures of it need, out of whatever `--ckpt` takes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from pretrain import checkpoint, exporting, foreign, hub
from pretrain.backbone import Backbone, BackboneConfig, timm_arguments
from pretrain.foreign_styles import IMAGENET
from pretrain.heads import Head
from pretrain.photometric import PhotometricConfig
from pretrain.token_clusters import head_from
from pretrain.views import ViewsConfig
from recipes.errors import UserError
from recipes.load import validate
from recipes.record import RECIPE

BACKBONE, HEAD = "teacher.backbone.vit.", "teacher.head."


class Opened(NamedTuple):
    """What a checkpoint holds."""

    backbone: Backbone  # in eval mode
    mean: list[float]  # of its images, in 0..1
    std: list[float]
    head: Head | None  # that has learned from patches
    headless: str  # why there is none; "" where there is one
    told: str  # what was opened, for people


def open_teacher(ckpt: str, size: list[int] | None = None) -> Opened:
    """Backbone, normalisation and head.

    ckpt: the run folder of a pretraining (then the teacher of its newest sound checkpoint, with the head that belongs
    to it), an exported teacher, a fine-tuned model or its run folder, or what foreign.py reads. size: height and width
    of the images, to which the positions are resized; None: those of the model. UserError as
    `checkpoint.load_backbone`.
    """
    ckpt = hub.local(ckpt)
    if foreign.is_foreign(ckpt):
        found = foreign.read(ckpt)
        wanted = exporting.resized(found.arguments, size)
        backbone = checkpoint.build_backbone(ckpt, found.tensors, found.arguments, wanted)
        without = f"{ckpt} holds no projection head" if not found.head else _unlearned("patches" in found.centres, ckpt)
        head = None if without else head_from(found.head, ckpt)
        return _opened(backbone, found.normalize, (head, without), found.report.sentence())
    if (of_run := _of_run(Path(ckpt), size)) is not None:
        return of_run
    stored = checkpoint.load_model(ckpt)[1]
    if "timm" in stored and "patch_size" not in stored["timm"]:
        raise UserError(f"{ckpt} is no Vision Transformer, so there are no patch tokens to look at; give one of a ViT")
    wanted = exporting.resized(stored["timm"], size) if "timm" in stored else None
    backbone, config = checkpoint.load_backbone(ckpt, wanted)
    what, normalize = "the teacher", config.get("normalize")
    if config.get("kind") == "reid":
        what, normalize = "the backbone of the fine-tuned model", config["augment"]
    without = f"{ckpt} is {what} alone, without its projection head; give the run folder of the pretraining"
    return _opened(backbone, normalize, (None, without), f"{what} {ckpt}")


def _opened(
    backbone: Backbone, normalize: Mapping[str, Any] | None, head: tuple[Head | None, str], told: str
) -> Opened:
    if normalize is None:
        normalize, told = IMAGENET, f"{told}; it does not tell mean and std of its images: ImageNet's are taken"
    return Opened(backbone.eval(), list(normalize["mean"]), list(normalize["std"]), *head, told)


def _unlearned(mim: bool, where: str) -> str:
    """Why the head has not learned from patches; "" if it has. mim: whether there is a centre of patches."""
    return "" if mim else f"{where} was trained without the MIM term, so its head never saw a patch"


def _of_run(run: Path, size: list[int] | None) -> Opened | None:
    """The newest state of a pretraining; None where `run` is not the folder of one."""
    state = checkpoint.newest_sound(run / "checkpoints")
    if state is None:
        return None
    tensors, facts = checkpoint.read_state(state)
    own = {key.removeprefix(BACKBONE): value for key, value in tensors.items() if key.startswith(BACKBONE)}
    if not own:
        return None  # a fine-tune
    recipe = facts.get("recipe") or _recipe(run)
    backbone_config, views, photometric = (
        validate(model, recipe.get(name, {}), f"the section {name} in the recipe of {run}")
        for name, model in (("backbone", BackboneConfig), ("views", ViewsConfig), ("photometric", PhotometricConfig))
    )
    arguments = timm_arguments(backbone_config, views.global_size)
    backbone = checkpoint.build_backbone(run, own, arguments, exporting.resized(arguments, size))
    without = _unlearned("centres.patches.centre" in tensors, str(run))
    head = {key.removeprefix(HEAD): value for key, value in tensors.items() if key.startswith(HEAD)}
    both = (None if without else head_from(head, str(run)), without)
    normalize = {"mean": photometric.mean, "std": photometric.std}
    return _opened(backbone, normalize, both, f"the teacher of {state}")


def _recipe(run: Path) -> dict[str, Any]:
    """The recipe of a run whose states do not tell it."""
    try:
        found = yaml.safe_load((run / RECIPE).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{run / RECIPE} cannot be read ({error}); give an exported teacher instead") from error
    if not isinstance(found, dict):
        raise UserError(f"{run / RECIPE} holds no recipe; give an exported teacher instead")
    return found
