"""Models on disk and in memory: from `--ckpt` to something that embeds."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.augment import AugmentConfig
from finetune.methods import build
from finetune.methods.base import Direct, Method, Parts
from finetune.sampling import SamplingConfig
from pretrain.backbone import Backbone, BackboneConfig, timm_arguments
from pretrain.checkpoint import load_backbone, load_model, save_model
from pretrain.foreign import is_foreign
from recipes.errors import UserError

SCRATCH = "none"  # `--ckpt none`: random weights


def start_backbone(ckpt: str, config: BackboneConfig, size: tuple[int, int], seed: int) -> tuple[Backbone, dict]:
    """The backbone that a training starts from, and the config stored with it ({} for random weights).

    ckpt: a path, what pretrain/foreign.py reads, or "none". size: height, width of the input. Another width or depth
    than the recipe's is a UserError.
    """
    wanted = timm_arguments(config, size)
    if ckpt != SCRATCH:
        return load_backbone(ckpt, wanted, config.drop_path)
    torch.manual_seed(seed)
    backbone = Backbone(wanted, drop_path=config.drop_path)
    backbone.initialise(config.init)
    return backbone, {}


def save(folder: Path, method: Method, section: dict[str, Any], augment: AugmentConfig, facts: dict[str, Any]) -> None:
    """Export a fine-tuned model. section: the recipe's `method` section."""
    config = {"kind": "reid", "method": section, "timm": method.backbone.arguments, "augment": augment.model_dump()}
    save_model(folder, method.state_dict(), {**config, **facts})


def _load_method(ckpt: str, tensors: dict[str, torch.Tensor], stored: dict[str, Any]) -> tuple[Method, AugmentConfig]:
    """A fine-tuned model as `save` stored it, and its augmentation."""
    parts = Parts(Backbone(stored["timm"]), stored["classes"], SamplingConfig(), 0)
    method = build(stored["method"], parts)
    try:
        method.load_state_dict(tensors)
    except RuntimeError as error:
        told = " ".join(str(error).split())[:300]
        raise UserError(f"--ckpt {ckpt}: weights and config do not belong together: {told}") from error
    return method, AugmentConfig(**stored["augment"])


def load_embedder(
    ckpt: str, config: BackboneConfig, augment: AugmentConfig, seed: int
) -> tuple[nn.Module, AugmentConfig]:
    """What `--ckpt` names, ready to embed, and how its input is prepared.

    A teacher, random weights or a file of another project embed with the CLS token as it is; a fine-tuned model of ours
    as its method does. A teacher or a file gets the normalisation of its training, as far as it is known, a fine-tuned
    model of ours everything as in its training.
    """
    if ckpt != SCRATCH and not is_foreign(ckpt):
        tensors, stored = load_model(ckpt)
        if stored.get("kind") == "reid":
            return _load_method(ckpt, tensors, stored)
    backbone, stored = start_backbone(ckpt, config, (augment.height, augment.width), seed)
    return Direct(backbone), augment.model_copy(update=stored.get("normalize", {}))


def load_stored(ckpt: str) -> tuple[nn.Module, AugmentConfig]:
    """As `load_embedder` without a recipe: a teacher too gets the input size that it was trained with."""
    if not is_foreign(ckpt):
        tensors, stored = load_model(ckpt)
        if stored.get("kind") == "reid":
            return _load_method(ckpt, tensors, stored)
    backbone, stored = load_backbone(ckpt)
    height, width = stored["timm"]["img_size"]
    return Direct(backbone), AugmentConfig(height=height, width=width, pad=0, **stored.get("normalize", {}))


def fingerprint(model: nn.Module) -> str:
    """Hexadecimal sha256 over the names and values of all weights, the same on every device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
