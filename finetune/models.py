"""Models on disk and in memory: from `--ckpt` to something that embeds."""

import hashlib
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from finetune import backbones, clip_files, clip_resnet, ibn_resnet
from finetune.augment import AugmentConfig
from finetune.backbones import BackboneConfig, TimmBackbone
from finetune.foreign import reid as foreign_reid
from finetune.methods import build
from finetune.methods.base import Direct, Method, Parts
from finetune.sampling import SamplingConfig
from pretrain import hub, untrusted
from pretrain.architecture import misfits
from pretrain.backbone import Backbone
from pretrain.checkpoint import CONFIG, load_backbone, load_model, read_state, save_model, states
from pretrain.committed import Damaged
from pretrain.foreign import TIMM, is_foreign
from pretrain.foreign_styles import bare_keys, unwrap
from pretrain.model_config import empty_model, model_arguments
from recipes.errors import UserError
from recipes.load import validate

MOCO = "encoder_q."  # of the trained encoder in a checkpoint of MoCo, such as LUPerson's ResNets
SCRATCH = "none"  # `--ckpt none`: random weights
SIZE = (256, 128)  # height, width of the images of a model of timm that is no ViT, which takes any


def start_backbone(
    ckpt: str, config: BackboneConfig, size: tuple[int, int], seed: int
) -> tuple[Backbone | TimmBackbone, dict]:
    """The backbone that a training starts from, and the config stored with it ({} for random weights).

    ckpt: a path, hub:OWNER/NAME, what pretrain/foreign.py reads, or "none". size: height, width of the input. Another
    width or depth than the recipe's is a UserError.
    """
    ckpt = hub.local(ckpt)
    wanted = backbones.arguments_of(config, size)
    vit = backbones.is_vit(config.name)
    if ckpt != SCRATCH and vit:
        return load_backbone(ckpt, wanted, config.drop_path)
    if ckpt != SCRATCH and is_foreign(ckpt) and not ckpt.startswith(TIMM):
        return _from_file(ckpt, wanted, config.drop_path)
    if ckpt != SCRATCH:
        return backbones.load(ckpt, wanted, config.drop_path)
    torch.manual_seed(seed)
    backbone = backbones.build(wanted, config.drop_path)
    if vit:
        backbone.initialise(config.init)
    return backbone, {}


def _from_file(ckpt: str, wanted: dict[str, Any], drop_path: float) -> tuple[TimmBackbone, dict[str, Any]]:
    """A network that is no ViT with the weights of a file: of a model fine-tuned elsewhere, or timm's or torchvision's
    own, whose classifier is left out. Strict: a UserError names what does not fit."""
    backbone = TimmBackbone(wanted, drop_path)
    clip = isinstance(backbone.model, clip_resnet.ClipResNet)
    found = None if clip else foreign_reid.read(ckpt)
    if clip:
        tensors = backbone.model.from_clip(clip_files.read(Path(ckpt)), f"--ckpt {ckpt}")
        facts = {"source": f"the image tower of {Path(ckpt).name}", "normalize": clip_resnet.NORMALIZE}
    elif found is not None:
        prefix, normalize = "backbone.model.", {key: found.config["augment"][key] for key in ("mean", "std")}
        tensors = {key.removeprefix(prefix): t for key, t in found.tensors.items() if key.startswith(prefix)}
        facts = {"source": found.config["source"], "normalize": normalize}
    else:
        state = untrusted.tensors_of(unwrap(untrusted.read(Path(ckpt)), ckpt).state, ckpt)
        classifier = f"{backbone.model.default_cfg.get('classifier', 'fc')}."
        keys = bare_keys(state)
        if any(key.startswith(MOCO) for key in keys):  # beside it: the momentum encoder and the queue
            keys = {key.removeprefix(MOCO): source for key, source in keys.items() if key.startswith(MOCO)}
        keys = {key: source for key, source in keys.items() if not key.startswith(classifier)}
        tensors = {key: state[source] for key, source in keys.items()}
        told = f"{len(tensors)} tensors of {Path(ckpt).name} without its classifier"
        tensors, split = ibn_resnet.from_plain(backbone.model, tensors)
        if split:
            told += f", a ResNet without IBN: {split} norms were split into instance and batch normalisation"
        facts = {"source": told}
    told = misfits(backbone.model.state_dict(), tensors)
    if told:
        raise UserError(f"--ckpt {ckpt} does not fit backbone.name = {wanted['model_name']!r}: {told}")
    backbone.model.load_state_dict(tensors)
    return backbone, facts


def save(folder: Path, method: Method, section: dict[str, Any], augment: AugmentConfig, facts: dict[str, Any]) -> None:
    """Export a fine-tuned model. section: the recipe's `method` section."""
    tensors, section = method.exported(section)
    config = {"kind": "reid", "method": section, "timm": method.backbone.arguments, "augment": augment.model_dump()}
    save_model(folder, tensors, {**config, **facts})


def _load_method(ckpt: str, tensors: dict[str, torch.Tensor], stored: dict[str, Any]) -> tuple[Method, AugmentConfig]:
    """A fine-tuned model as `save` stored it, and its augmentation."""
    where = f"--ckpt {ckpt}"
    described = model_arguments(stored.get("timm"), where)
    section, *counts = stored.get("method"), stored.get("classes"), stored.get("cameras", 0)
    if not isinstance(section, dict) or any(type(count) is not int or not 0 <= count < 1 << 24 for count in counts):
        raise UserError(
            f"{where}: its {CONFIG} does not tell method, classes and cameras of the model; export it again"
        )

    def made() -> Method:
        return build(section, Parts(backbones.build(described), *counts, SamplingConfig(), 0))

    method = empty_model(made, where, tensors) or made()
    told = misfits(method.state_dict(), tensors)
    if told:
        raise UserError(f"{where}: its weights are not exactly those of the method {section['name']!r}: {told}")
    method = made()
    method.load_state_dict(tensors)
    return method, validate(AugmentConfig, stored.get("augment"), f"{where}: augment in its {CONFIG}")


def _prepared(augment: dict[str, Any], stored: dict[str, Any], ckpt: str) -> AugmentConfig:
    """How the input of a backbone is prepared: as `augment` says, with the normalisation of its training if known."""
    normalize = stored.get("normalize", {})
    if not isinstance(normalize, dict) or not normalize.keys() <= {"mean", "std"}:
        raise UserError(f"--ckpt {ckpt}: normalize in its {CONFIG} must hold mean and std, one number a colour")
    return validate(AugmentConfig, augment | normalize, f"--ckpt {ckpt}: normalize in its {CONFIG}")


def _of_epoch(state: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """The model in RUN/checkpoints/samples-N, of an epoch of a fine-tune that has ended, with the config of RUN/model;
    None: `state` is another thing. UserError where one of the two is damaged."""
    if state not in states(state.parent):
        return None
    try:
        tensors, _ = read_state(state)
    except Damaged as error:
        raise UserError(f"--ckpt {state}: {error}; take another state, or the model of the run") from error
    last, stored = load_model(state.parent.parent)
    return {key: tensors[f"method.{key}"] for key in last if f"method.{key}" in tensors}, stored


def fine_tuned(
    ckpt: str, choices: foreign_reid.Choices = foreign_reid.AS_PUBLISHED
) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """Weights and config of a model that was fine-tuned with identities, here or elsewhere; None: `ckpt` is another
    thing. choices: what a file from elsewhere does not tell."""
    if ckpt == SCRATCH or ckpt.startswith(TIMM):
        return None
    if is_foreign(ckpt):
        found = foreign_reid.read(ckpt, choices)
        return None if found is None else (found.tensors, found.config)
    tensors, stored = _of_epoch(Path(ckpt)) or load_model(ckpt)
    return (tensors, stored) if stored.get("kind") == "reid" else None


def load_embedder(
    ckpt: str, config: BackboneConfig, augment: AugmentConfig, seed: int
) -> tuple[nn.Module, AugmentConfig]:
    """What `--ckpt` names, ready to embed, and how its input is prepared.

    A teacher, random weights or a backbone of another project embed with the CLS token as it is; a model that was
    fine-tuned for re-identification, here or elsewhere, as its method does. A backbone gets the normalisation of its
    training, as far as it is known, a fine-tuned model everything as in its training.
    """
    ckpt = hub.local(ckpt)
    found = fine_tuned(ckpt)
    if found is not None:
        return _load_method(ckpt, *found)
    backbone, stored = start_backbone(ckpt, config, augment.size, seed)
    return Direct(backbone), _prepared(augment.model_dump(), stored, ckpt)


def load_stored(
    ckpt: str, choices: foreign_reid.Choices = foreign_reid.AS_PUBLISHED
) -> tuple[nn.Module, AugmentConfig]:
    """As `load_embedder` without a recipe: a teacher too gets the input size that it was trained with."""
    return load_known(ckpt, choices)[:2]


def load_known(
    ckpt: str, choices: foreign_reid.Choices = foreign_reid.AS_PUBLISHED
) -> tuple[nn.Module, AugmentConfig, dict[str, Any]]:
    """As `load_stored`, and the config that is stored with the model."""
    ckpt = hub.local(ckpt)
    found = fine_tuned(ckpt, choices)
    if found is not None:
        return *_load_method(ckpt, *found), found[1]
    name = ckpt.removeprefix(TIMM).partition(".")[0]
    if ckpt.startswith(TIMM) and timm.is_model(name) and not backbones.is_vit(name):
        height, width = SIZE
        wanted = backbones.arguments_of(BackboneConfig(name=name), SIZE)
        backbone, stored = backbones.load(ckpt, wanted, 0.0)
    else:
        backbone, stored = load_backbone(ckpt)
        height, width = stored["timm"]["img_size"]
    return Direct(backbone), _prepared({"height": height, "width": width, "pad": 0}, stored, ckpt), stored


def fingerprint(model: nn.Module) -> str:
    """Hexadecimal sha256 over the names and values of all weights, the same on every device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
