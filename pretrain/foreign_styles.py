"""How other projects name the weights of a Vision Transformer, and what of their files is left out and why.

A file is unwrapped (`unwrap`), its keys are sorted into weights of the backbone, by timm's names, and keys that are
left out for a stated reason (`sort_keys`). A key that is neither is an error: nothing is dropped because of a part of
its name.
"""

import argparse
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recipes.errors import UserError

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
HALVES = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
# dictionaries around the weights, in the order in which the published loaders open them
WRAPPERS = ("model", "state_dict", "module", "teacher", "target_encoder")

PROJECTION = "projection head: only a pretraining can take it"
CLASSIFIER = "classifier of another training"
MASK = "mask embedding: only a pretraining can take it"
# whole keys of a backbone -> why they are left out
ANYWHERE = {r"masked_embed|mask_token": MASK}
# PASS has three part tokens between CLS and the patches: registers of timm, each with a position
PARTS = tuple(f"part_token{n}" for n in (1, 2, 3))
PART_POSITIONS = ("cls_pos", *(f"part{n}_pos" for n in (1, 2, 3)))


class Style(NamedTuple):
    """A way to lay out a file. Patterns match whole keys, from which `bare_keys` has taken the wrappers."""

    name: str
    prefix: str  # of the backbone's keys
    outside: dict[str, str]  # pattern of whole keys outside of the backbone -> why they are left out
    within: dict[str, str]  # the same for keys of the backbone, without the prefix
    normalize: dict[str, list[float]] | None  # of the images that it was trained on; None: the file does not tell


NETWORK = Style("training file", "backbone.", {r"(dino_|ibot_)?head\..+": PROJECTION}, {}, IMAGENET)
FINE_TUNED = Style(
    "fine-tuned for person re-identification (PersonViT, TransReID-SSL, PASS)",
    "base.",
    {r"bottleneck(_\d)?\.\w+": "BNNeck: belongs to the identities of its training", r"classifier\.weight": CLASSIFIER},
    {r"fc\.(weight|bias)": "never used: a layer of 1000 classes that the published code builds"},
    HALVES,
)
MSN = Style("MSN training file, target encoder", "", {}, {r"fc\..+": "projection head of MSN"}, IMAGENET)
BARE = Style("bare backbone", "", {}, {r"(head|fc|pre_logits\.fc)\.(weight|bias)": CLASSIFIER}, None)


class Unwrapped(NamedTuple):
    """The state dict inside a file."""

    state: Mapping[str, Any]
    opened: tuple[str, ...]  # the keys that led to it
    beside: dict[str, Any]  # what lay beside it


class Sorted(NamedTuple):
    """The keys of a file."""

    style: Style
    backbone: dict[str, Tensor]  # by timm's names; pos_embed may have fewer places than timm's for the prefix
    origin: dict[str, str]  # timm's name -> key in the file
    left_out: dict[str, str]  # key in the file -> why
    others: dict[str, Tensor]  # the left-out tensors of the head and the mask embedding, by their keys
    places: int | None  # of the prefix in pos_embed; None: not known from the names


def unwrap(content: Any, where: str) -> Unwrapped:
    """Open model, state_dict, module, and teacher or target_encoder, as far as they are there, in this order.

    Raises UserError when there are no weights, or those of a student alone.
    """
    opened, beside = [], {}
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            beside |= {name: value for name, value in content.items() if name != key}
            content = content[key]
            opened.append(key)
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        inside = ", ".join(map(str, content))[:200] if isinstance(content, Mapping) else type(content).__name__
        student = " (a student without its teacher, which is the model to go on with)" if "student" in inside else ""
        raise UserError(f"{where} holds no weights under {', '.join(WRAPPERS)} or bare; it holds {inside}{student}")
    return Unwrapped(content, tuple(opened), beside)


def settings(beside: Mapping[str, Any]) -> dict[str, Any]:
    """The command line arguments stored beside the weights; {} when there are none."""
    found = beside.get("args", {})
    return vars(found) if isinstance(found, argparse.Namespace) else dict(found) if isinstance(found, Mapping) else {}


def bare_keys(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Key without what DDP and torch.compile put in front of all keys -> key in the file."""
    keys = {key: key for key in state}
    for wrapper in ("module.", "_orig_mod.", "module."):
        if all(key.startswith(wrapper) for key in keys):
            keys = {key.removeprefix(wrapper): origin for key, origin in keys.items()}
    return keys


def style_of(keys: Mapping[str, str], file: Unwrapped) -> Style:
    """Which style the keys have."""
    of_backbone = [key for key in keys if key.startswith("backbone.")]
    if of_backbone:
        project = "iBOT (also PersonViT)" if "ibot_loss" in file.beside else "DINO"
        if any(key.startswith("head.last_layer2") for key in keys):
            project = "iBOT (also PersonViT)"
        if any(re.match(r"backbone\.(part_token|cls_pos)", key) for key in of_backbone):
            project = "PASS"
        if any(re.match(r"(dino|ibot)_head\.|.*\.ls1\.gamma", key) for key in keys):
            project = "DINOv2"
        whole = "teacher" if "teacher" in file.opened else "network"
        return NETWORK._replace(name=f"{project} {NETWORK.name}, {whole}")
    if any(key.startswith("base.") for key in keys):
        return FINE_TUNED
    if "target_encoder" in file.opened:
        return MSN
    if "part_token1" in keys or "cls_pos" in keys:
        return BARE._replace(name="PASS backbone", normalize=IMAGENET)
    if "mask_token" in keys or "register_tokens" in keys:
        return BARE._replace(name="DINOv2 backbone", normalize=IMAGENET)
    if "patch_embed.conv.0.weight" in keys:
        return BARE._replace(name="TransReID-SSL backbone with the ICS stem", normalize=IMAGENET)
    return BARE


def timm_name(key: str) -> str:
    """timm's name of a backbone's key. DINOv2 chunks its blocks: `blocks.<chunk>.<block>`, counted through."""
    key = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key)
    key = re.sub(r"\.gamma_([12])$", r".ls\1.gamma", key)  # as BEiT names the layer scale
    key = key.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
    return "reg_token" if key == "register_tokens" else key


def _why(key: str, style: Style) -> str | None:
    """Why a key is left out; "" for one of the backbone, None for one that the style does not know."""
    inside = key.startswith(style.prefix)
    rules = style.within | ANYWHERE if inside else style.outside
    inner = key.removeprefix(style.prefix) if inside else key
    return next((why for pattern, why in rules.items() if re.fullmatch(pattern, inner)), "" if inside else None)


def sort_keys(file: Unwrapped, state: Mapping[str, Tensor], where: str) -> Sorted:
    """Every key of the state dict: a weight of the backbone, or left out for a reason.

    Raises UserError naming keys outside of the backbone that the style does not know, and keys that fall together.
    """
    keys = bare_keys(state)
    style = style_of(keys, file)
    backbone, origin, left_out, others, unknown = {}, {}, {}, {}, []
    for key, source in keys.items():
        why = _why(key, style)
        if why is None:
            unknown.append(source)
            continue
        if why:
            left_out[source] = why
            others |= {key: state[source]} if why in (PROJECTION, MASK) else {}
            continue
        name = timm_name(key.removeprefix(style.prefix))
        if name in backbone:
            raise UserError(f"{where}: {origin[name]} and {source} are both {name} in timm; the file is refused")
        backbone[name], origin[name] = state[source], source
    if unknown:
        raise UserError(f"{where} ({style.name}): {listed(unknown)} unknown to this style, so the file is refused")
    places = 1 if f"{style.prefix}register_tokens" in keys else None
    if not {*PARTS, *PART_POSITIONS}.isdisjoint(backbone):
        _join_parts(backbone, origin, where)
        places = len(PART_POSITIONS)
    return Sorted(style, backbone, origin, left_out, others, places)


def _join_parts(backbone: dict[str, Tensor], origin: dict[str, str], where: str) -> None:
    """PASS keeps every token and its position apart; timm has them in rows, the patches last. In place."""
    patches = backbone.get("pos_embed")
    single = None if patches is None or patches.ndim != 3 else (1, 1, patches.shape[2])
    lacking = [key for key in (*PARTS, *PART_POSITIONS) if key not in backbone or backbone[key].shape != single]
    if patches is None or lacking:
        raise UserError(f"{where} has part tokens of PASS but no fitting {(lacking or ['pos_embed'])[0]}; the file is "
                        "refused")  # fmt: skip
    for name, parts, last in (("reg_token", PARTS, ()), ("pos_embed", PART_POSITIONS, ("pos_embed",))):
        joined = [*parts, *last]
        backbone[name] = torch.cat([backbone[key] for key in joined], dim=1)
        origin[name] = ", ".join(origin[key] for key in joined)
    for key in (*PARTS, *PART_POSITIONS):
        del backbone[key], origin[key]


def listed(names: list[str], shown: int = 5) -> str:
    """`3 keys (a, b, c) are`: how many, and the first of them."""
    more = ", ..." if len(names) > shown else ""
    count = "1 key" if len(names) == 1 else f"{len(names)} keys"
    return f"{count} ({', '.join(names[:shown])}{more}) {'is' if len(names) == 1 else 'are'}"
