"""Models that other projects fine-tuned for re-identification, as `bot` models of ours.

Every key of a file is taken or left out for a stated reason; the rest is an error, here or where the weights meet the
model. docs/checkpoints.md lists the projects (layouts.py), and what their files do not tell (`Choices`).
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from finetune.augment import AugmentConfig
from finetune.foreign.draft import Choices, Draft, Made
from finetune.foreign.layouts import layout_of
from finetune.necks import GEM_POWER
from pretrain import untrusted
from pretrain.foreign import SUFFIXES, Report
from pretrain.foreign_styles import bare_keys, listed, unwrap
from recipes.errors import UserError

AS_PUBLISHED = Choices()


class Reid(NamedTuple):
    """What a file holds, as `models.save` would have written it."""

    tensors: dict[str, Tensor]  # by the names of methods/bot.py
    config: dict[str, Any]
    report: Report


def read(ckpt: str | Path, choices: Choices = AS_PUBLISHED) -> Reid | None:
    """A checkpoint of another project as a `bot` model; None: it is none that was fine-tuned for re-identification.

    UserError where the file is damaged, wants to run something, or holds keys or a network that are not known here.
    Whether all weights of the model are there shows when they are loaded into it.
    """
    path, where = Path(ckpt), str(ckpt)
    if path.suffix not in SUFFIXES or not path.is_file():
        return None
    content = untrusted.read(path)
    try:
        file = unwrap(content, where)
    except UserError:  # pretrain/foreign.py will say it
        return None
    names = bare_keys({key: value for key, value in file.state.items() if isinstance(key, str)})
    layout = layout_of({key: file.state[source] for key, source in names.items()})
    if layout is None:
        return None
    state = untrusted.tensors_of(file.state, where)
    draft = Draft(where, choices, {key: state[source] for key, source in bare_keys(state).items()})
    try:
        made = layout(draft)
        unknown = draft.unknown()
        if unknown:
            raise UserError(f"{where} ({made.style}): {listed(unknown)} unknown to this style, so the file is refused")
        return _finished(draft, made)
    except (IndexError, TypeError, RuntimeError, ValidationError) as error:  # the layouts rely on the shapes of tensors
        told = " ".join(str(error).split())[:200]
        raise UserError(f"{where}: its tensors do not have the shapes that their names ask for ({told})") from error


def _finished(draft: Draft, made: Made) -> Reid:
    """The tensors in memory, and what stands in config.json."""
    classifier = draft.taken.get("neck.classifier.weight")
    if classifier is None:
        raise UserError(
            f"{draft.where} ({made.style}) has no classifier, so it does not tell how many identities it knows"
        )
    choices = draft.choices
    pooling = choices.pooling or made.pooling
    if pooling == "gem" and "pooling.p" not in draft.taken:  # a fixed power is in no file
        draft.take("pooling.p", value=torch.tensor(GEM_POWER))
    necks = {"feature": choices.feature or made.feature, **({"pooling": pooling} if pooling else {})}
    augment = AugmentConfig(
        height=made.size[0],
        width=made.size[1],
        pad=min(10, min(made.size) - 1),
        test_kernel=made.test_kernel,
        **(choices.normalize or made.normalize),
    )
    origin = {
        name: " and ".join(keys) or "no key: made, as the project has none" for name, keys in draft.origin.items()
    }
    report = Report(draft.where, made.style, origin, draft.left_out, {}, tuple(draft.notes), "of the model")
    config = {"kind": "reid", "method": {"name": "bot", "necks": necks, **draft.method}, "timm": made.arguments}
    config |= {"augment": augment.model_dump(mode="json"), "classes": len(classifier), "cameras": draft.cameras}
    # without folders: this text travels with the model
    config["source"] = replace(report, source=Path(draft.where).name).sentence()
    return Reid({name: _own(value) for name, value in draft.taken.items()}, config, report)


def _own(tensor: Tensor) -> Tensor:
    """A copy in memory, float32 where it is a number with a fraction."""
    return tensor.detach().to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True).contiguous()
