"""The layouts of models fine-tuned for re-identification: one function each, from a draft's keys to a `bot` model.

ViTs: TransReID-SSL, PersonViT, TransReID, PASS. Swin: SOLIDER. ResNets: fast-reid, torchreid, the strong baseline of
BoT. Sizes, normalisation and the side of the neck are those of the published recipes: no file tells them.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from finetune.foreign import resnet, swin
from finetune.foreign.draft import NECK, Draft, Made
from pretrain import architecture, foreign
from pretrain.foreign_styles import CLASSIFIER, HALVES, IMAGENET, Unwrapped, sort_keys
from recipes.errors import UserError

OVERLAPPING = (210, 310)  # patches of 256 x 128 and 384 x 128 pixels at a stride of 12 pixels, as TransReID has it
LIKELY = (24, 8)  # patches of 384 x 128 pixels: neither a square nor 2:1
SLICES = 4  # of TransReID's jigsaw patches


def layout_of(keys: Mapping[str, Tensor]) -> Callable[[Draft], Made] | None:
    """Who wrote these keys; None: nobody who fine-tunes for re-identification."""
    if "backbone.layer1.0.conv1.weight" in keys and any(key.startswith("heads.") for key in keys):
        return fast_reid
    if "base.layer1.0.conv1.weight" in keys:
        return strong_baseline
    if any(key.startswith("base.stages.") for key in keys):
        return solider
    if any(key.startswith("base.") for key in keys):
        return transreid
    if "layer1.0.conv1.weight" in keys and "classifier.weight" in keys:
        return torchreid
    return None


def transreid(draft: Draft) -> Made:
    """A ViT under `base.`: TransReID-SSL and PersonViT; TransReID, with `sie_embed`, `b1` and `b2`; PASS."""
    keys, where, choices = draft.keys, draft.where, draft.choices
    base = {key: key for key in keys if key.startswith("base.") and key != "base.sie_embed"}  # name -> key
    jigsaw = any(key.startswith("b1.") for key in keys)
    if jigsaw:  # the global feature comes from b1; the backbone's own last block and norm stay as they were copied
        last = max((int(key.split(".")[2]) for key in base if key.startswith("base.blocks.")), default=0)
        draft.drop(rf"base\.(blocks\.{last}|norm)\..+", "never used: the branch b1 has its own last block and norm")
        base = {name: key for name, key in base.items() if key not in draft.left_out}
        for old, new in (("b1.0.", f"base.blocks.{last}."), ("b1.1.", "base.norm.")):
            base |= {new + key.removeprefix(old): key for key in keys if key.startswith(old)}
    state = {name: keys[key] for name, key in base.items()}
    found = sort_keys(Unwrapped(state, (), {}), state, where)
    architecture.need_vit(found.backbone, where)
    if choices.size is None and found.backbone["pos_embed"].shape[1] - 1 in OVERLAPPING:
        raise UserError(
            f"{where} has positions for patches that overlap (stride 12), which no ViT here has; the file is refused"
        )
    hint = None if choices.size is None else (choices.size[0] // 16, choices.size[1] // 16)
    tensors, grid = foreign.whole_positions(found, hint, LIKELY, where)
    for name, value in tensors.items():
        draft.take(f"backbone.vit.{name}", *(base[each] for each in found.origin[name].split(", ")), value=value)
    draft.left_out |= {base[name]: why for name, why in found.left_out.items()}
    parts, cameras = "reg_token" in tensors, keys.get("base.sie_embed")
    if parts and (jigsaw or cameras is not None):
        raise UserError(f"{where} has the part tokens of PASS beside TransReID's cameras or branches; it is refused")
    if cameras is not None:
        draft.take("sie.vectors", "base.sie_embed", value=cameras.flatten(1))
        draft.method["sie"], draft.cameras = {}, len(cameras)
        draft.notes.append(
            f"{len(cameras)} camera vectors, in the numbers of its training; other cameras get their mean"
        )
    draft.move("classifier.", "neck.classifier.")
    if parts:
        _pass_necks(draft, tensors["cls_token"].shape[2])
    else:
        draft.move("bottleneck.", "neck.norm.")
    if jigsaw:
        _branches(draft)
    kind = "PASS" if parts else "TransReID, jigsaw patches" if jigsaw else "PersonViT, TransReID-SSL"
    arguments = architecture.timm_arguments_of(tensors, grid, where)
    return Made(kind, arguments, tuple(arguments["img_size"]), HALVES, "before", "cls_parts" if parts else None)


def _pass_necks(draft: Draft, dim: int) -> None:
    """PASS searches with CLS and the mean of the part tokens, joined; before one neck of all, or before one of each."""
    classifier = draft.taken.get("neck.classifier.weight")
    if classifier is not None and classifier.shape[1] != 2 * dim:
        raise UserError(
            f"{draft.where} adds CLS and the part tokens of PASS up, where here they are joined; it is refused"
        )
    if "bottleneck_1.weight" in draft.keys:
        draft.drop(rf"bottleneck(_[123])?\.({'|'.join(NECK)})", "one neck a token; the feature is taken before them")
        draft.idle_neck()
    else:
        draft.move("bottleneck.", "neck.norm.")


def _branches(draft: Draft) -> None:
    """The slices of TransReID's jigsaw patches: one block and norm, a neck and a classifier each."""
    draft.method["jpm"] = {"slices": SLICES}
    draft.move("b2.0.", "jpm.block.")
    draft.move("b2.1.", "jpm.norm.")
    for place in range(SLICES):
        draft.move(f"bottleneck_{place + 1}.", f"local_necks.{place}.norm.")
        draft.move(f"classifier_{place + 1}.", f"local_necks.{place}.classifier.")


def solider(draft: Draft) -> Made:
    """A Swin Transformer under `base.`: SOLIDER-REID."""
    weight, size = draft.choices.semantic_weight, draft.choices.size or (384, 128)
    weight = swin.SEMANTIC_WEIGHT if weight is None else weight
    base = {key.removeprefix("base."): value for key, value in draft.keys.items() if key.startswith("base.")}
    tensors, origin, left_out = swin.by_timms_names(base, weight, draft.where)
    for name, value in tensors.items():
        draft.take(f"backbone.model.{name}", *(f"base.{key}" for key in origin[name]), value=value)
    draft.left_out |= {f"base.{key}": why for key, why in left_out.items()}
    draft.move("bottleneck.", "neck.norm.")
    draft.move("classifier.", "neck.classifier.")
    draft.notes.append(f"at the semantic weight {weight:g}")
    return Made("SOLIDER", swin.arguments_of(tensors, size, draft.where), size, HALVES, "before")


def strong_baseline(draft: Draft) -> Made:
    """A ResNet under `base.`: the strong baseline of BoT (Luo et al. 2019), whose stem has no ReLU."""
    draft.drop(r"base\.fc\.(weight|bias)", CLASSIFIER)
    draft.move("base.", "backbone.model.")
    draft.move("bottleneck.", "neck.norm.")
    draft.move("classifier.", "neck.classifier.")
    size = draft.choices.size or (256, 128)
    return Made("strong baseline of BoT", _resnet(draft, 1, stem_act=False), size, IMAGENET, "after")


def fast_reid(draft: Draft) -> Made:
    """A ResNet of fast-reid: `backbone.`, `heads.`; it takes pixels in 0..255 and searches behind the neck."""
    keys = draft.keys
    draft.move("backbone.", "backbone.model.")
    neck = next((prefix for prefix in ("heads.bottleneck.0.", "heads.bnneck.") if f"{prefix}weight" in keys), None)
    if neck and keys[f"{neck}weight"].ndim != 1:
        raise UserError(
            f"{draft.where}: {neck}weight shortens the feature, which no neck here does; the file is refused"
        )
    if neck:
        draft.move(neck, "neck.norm.")
    for key in ("heads.weight", "heads.classifier.weight"):
        if key in keys:
            draft.take("neck.classifier.weight", key)
    pooling = None
    if "heads.pool_layer.p" in keys:
        draft.take("pooling.p", "heads.pool_layer.p", value=keys["heads.pool_layer.p"].reshape(()))
        pooling = "gem"
    normalize = dict(IMAGENET)
    for key, name in (("pixel_mean", "mean"), ("pixel_std", "std")):
        if key in keys:
            normalize[name] = [round(float(value) / 255, 6) for value in keys[key].flatten()]
            draft.left_out[key] = f"{name} of the images, now of 0..1 and not of 0..255"
    size = draft.choices.size or (256, 128)
    return Made("fast-reid", _resnet(draft, 1, stem_padding=0), size, normalize, "after", pooling, "bicubic")


def torchreid(draft: Draft) -> Made:
    """A bare ResNet of torchreid (deep-person-reid): no neck, a classifier with bias."""
    if "fc.0.weight" in draft.keys:
        raise UserError(
            f"{draft.where}: fc.0.weight shortens the feature, which no neck here does; the file is refused"
        )
    for key in draft.keys:
        if re.match(r"(conv1|bn1|layer[1-4])\.", key):
            draft.take(f"backbone.model.{key}", key)
    draft.drop(r"classifier\.bias", "the classifier here has no bias; the feature does not depend on it")
    draft.take("neck.classifier.weight", "classifier.weight")
    draft.idle_neck()
    size = draft.choices.size or (256, 128)
    return Made("torchreid", _resnet(draft, 2), size, IMAGENET, "before")


def _resnet(draft: Draft, last_stride: int, **details: Any) -> dict[str, Any]:
    """Arguments of the backbone; the stride that was published, unless another one was chosen."""
    prefix, stride = "backbone.model.", draft.choices.last_stride or last_stride
    own = {name.removeprefix(prefix): value for name, value in draft.taken.items() if name.startswith(prefix)}
    draft.notes.append(f"last stride {stride}, which no file tells")
    return resnet.arguments_of(own, draft.where, last_stride=stride, **details)
