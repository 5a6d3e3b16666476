"""R23: other projects' files with a key missing, one too many, one of another shape: exactly that is told."""

import collections
import re
from collections.abc import Iterator
from typing import Any

import pytest
import strangers
import strangers_reid
import torch
from strangers import written
from torch import Tensor

from finetune import models
from finetune.foreign import reid
from pretrain import foreign
from recipes.errors import UserError

VITS, REID = strangers.strangers(), strangers_reid.strangers()
WRAPPERS = ("model", "state_dict", "module", "teacher", "target_encoder")
# Some keys tell which model it is, so that others do not fit any more: the fault, the key by timm's name, what is told
FOLLOWS = {
    ("missing", "blocks.0.attn.qkv.bias"): "1 not expected (blocks.1.attn.qkv.bias)",
    ("missing", "blocks.0.ls1.gamma"): "3 not expected (blocks.0.ls2.gamma",
    ("missing", "patch_embed.conv.0.weight"): "21 not expected (patch_embed.conv.3.weight",
    ("another shape", "cls_token"): "its 65 channels",
    ("another shape", "pos_embed"): "has positions for",
    ("another shape", "patch_embed.proj.weight"): "cuts images into patches of 16 pixels, not of",
}
PASS_POSITIONS = "has part tokens of PASS but no fitting part_token1"  # in the place of pos_embed
# Without it the file is, key by key, another one that is whole
ANOTHER = {
    ("DINOv2 with registers", "register_tokens"),
    ("TransReID", "module.base.sie_embed"),
    ("fast-reid IBN GeM", "heads.pool_layer.p"),
}


def state_of(content: dict[str, Any]) -> dict[str, Tensor]:
    """The weights, inside of what wraps them."""
    for key in WRAPPERS:
        content = content[key] if isinstance(content.get(key), dict) else content
    return content


def with_state(content: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Any]:
    """The same file with other weights."""
    if content is state_of(content):
        return state
    inner = next(key for key in WRAPPERS if isinstance(content.get(key), dict))
    return content | {inner: with_state(content[inner], state)}


def faults(state: dict[str, Tensor], key: str) -> Iterator[tuple[str, str, dict[str, Tensor]]]:
    """What is done to the file, the key that must be told, and the weights after it."""
    yield "missing", key, {name: tensor for name, tensor in state.items() if name != key}
    strange = f"{key.rpartition('.')[0] or 'blocks.0'}.colour"
    yield "too many", strange, state | {strange: torch.zeros(3)}
    shape = tuple(size + 1 for size in state[key].shape) or (2,)
    yield "another shape", key, state | {key: torch.zeros(shape, dtype=state[key].dtype)}


def each_once(state: dict[str, Tensor]) -> list[str]:
    """One key of each kind: of those that differ in numbers only, the first."""
    return list({re.sub(r"\d+", "#", key): key for key in reversed(state)}.values())


def names(told: str, key: str, fault: str, taken: dict[str, str]) -> bool:
    """Whether a sentence names the key, by its project's name or by timm's, or what follows from it."""
    if fault == "too many":
        return "colour" in told
    ours = [name for name, source in taken.items() if key in source.split(" and ")]
    if any(FOLLOWS.get((fault, name), told + "!") in told for name in ours):
        return True
    if key.endswith("pos_embed") and PASS_POSITIONS in told:
        return True
    return any(name in told for name in (*ours, key.removeprefix("module.").removeprefix("backbone.")))


class Count(collections.Counter):
    """Files tried; those that were read as if nothing were wrong, or refused without naming the key."""

    def see(self, kind: str, fault: str, wrong: bool, told: str) -> None:
        self["tried"] += 1
        self["wrong"] += wrong
        if wrong:
            print(f"{kind}: {fault}: {told}")


def check_vit(kind: str, keys: list[str], folder: Any, count: Count) -> None:
    """Every fault with these keys of a ViT's file: read as before if it is left out anyway, else refused by name."""
    stranger = VITS[kind]
    state = state_of(stranger.content)
    sound = foreign.read(written(folder, stranger.content))
    for key in keys:
        for fault, named, changed in faults(state, key):
            if fault == "missing" and (kind, key) in ANOTHER:
                continue
            path, told = written(folder, with_state(stranger.content, changed)), "it was read"
            try:
                found = foreign.read(path)
                left = stranger.left_out - {key} if fault == "missing" else stranger.left_out
                fine = key in stranger.left_out and found.tensors.keys() == sound.tensors.keys()
                fine = fine and set(found.report.left_out) - ({named} - {key}) == left
            except UserError as error:
                told = str(error)
                fine = names(told, named, fault, sound.report.taken)
            count.see(kind, f"{fault} {named}", not fine, told)


def check_reid(kind: str, keys: list[str], folder: Any, count: Count) -> None:
    """Every fault with these keys of a fine-tuned model's file: as before if it is left out anyway, else refused."""
    stranger = REID[kind]
    state = state_of(stranger.content)
    sound = reid.read(written(folder, stranger.content))
    for key in keys:
        point = [("another shape", key, state | {key: torch.zeros(())})] if state[key].numel() > 1 else []
        for fault, named, changed in (*faults(state, key), *point):
            if fault == "missing" and (kind, key) in ANOTHER:
                continue
            path, told = written(folder, with_state(stranger.content, changed)), "it was read"
            bare = key.removeprefix("module.")
            left = stranger.left_out - ({bare} if fault == "missing" else set())
            try:
                models.load_stored(path)  # compares strictly, as the model that is built by the file's sizes has to fit
                found = reid.read(path)
                extra = {named.removeprefix("module.")} - {bare}
                fine = bare in stranger.left_out and set(found.report.left_out) - extra == left
            except UserError as error:  # more than four keys are not all named, and parts have names of their own here
                told, fine = str(error), True
                count["named"] += names(told, named.removeprefix("module."), fault, sound.report.taken)
            count.see(kind, f"{fault} {named}", not fine, told)


@pytest.mark.row("R23")
@pytest.mark.parametrize("kind", ["PersonViT", "TransReID-SSL ICS", "DINO", "DINOv2"])
def test_a_key_missing_too_many_or_reshaped(kind, tmp_path, figures):
    count, keys = Count(), list(state_of(VITS[kind].content))
    check_vit(kind, [keys[0], keys[1], keys[len(keys) // 2], keys[-1]], tmp_path, count)
    figures("R23", injected=f"keys of {kind}", times=count["tried"], lost=0, wrong=count["wrong"])
    assert count["wrong"] == 0


@pytest.mark.soak
@pytest.mark.row("R23")
def test_every_key_of_every_style(tmp_path, figures):
    count = Count()
    for kind in VITS:
        check_vit(kind, list(state_of(VITS[kind].content)), tmp_path, count)
    note = f"every key of {len(VITS)} styles: what is missing or too many is told by its name"
    injected = "a key missing, too many, of another shape"
    figures("R23", injected=injected, times=count["tried"], lost=0, wrong=count["wrong"], note=note)
    assert count["wrong"] == 0


@pytest.mark.soak
@pytest.mark.row("R23")
def test_keys_of_every_style_of_fine_tuned_models(tmp_path, figures):
    count = Count()
    for kind in REID:
        check_reid(kind, each_once(state_of(REID[kind].content)), tmp_path, count)
    note = f"{len(REID)} styles, loaded strictly; {count['named']} name the key, the others what it belongs to"
    injected = "the same, of models fine-tuned elsewhere"
    figures("R23", injected=injected, times=count["tried"], lost=0, wrong=count["wrong"], note=note)
    assert count["wrong"] == 0
