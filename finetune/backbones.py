"""Networks that a fine-tune can train: pretrain's Vision Transformer, or any other model of timm, such as ResNet-50."""

import inspect
from typing import Any, Literal

import timm
import torch
from pydantic import Field
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

from pretrain.backbone import Backbone, Tokens, timm_arguments
from pretrain.backbone import BackboneConfig as VitConfig
from pretrain.checkpoint import load_model
from pretrain.foreign import TIMM
from recipes.errors import UserError


class BackboneConfig(VitConfig):
    """As in pretraining; `name` may be any model of timm. For other models than a ViT only name, drop_path and what
    stands here count."""

    last_stride: Literal[1, 2] | None = None  # of a ResNet's last stage; BoT has 1: twice as many rows and columns
    drop_path: float = Field(0.1, ge=0, lt=1)  # stochastic depth of the last block; models without it take 0 only


def is_vit(name: str) -> bool:
    """Whether timm's model of that name is a plain Vision Transformer, which pretraining knows."""
    if not timm.is_model(name):
        raise UserError(f"backbone.name = {name!r} is no timm model; see timm.list_models()")
    return timm.model_entrypoint(name).__module__ == "timm.models.vision_transformer"


def arguments_of(config: BackboneConfig, size: tuple[int, int]) -> dict[str, Any]:
    """What `build` makes the backbone from. size: height, width of the images in pixels."""
    if is_vit(config.name):
        if config.last_stride is not None:
            raise UserError(f"backbone.last_stride is for ResNets; {config.name} has none, leave it away")
        return timm_arguments(config, size)
    given = [key for key in ("embed_dim", "depth", "num_heads") if getattr(config, key) is not None]
    given += [key for key, default in (("registers", 0), ("stem", "patch"), ("compile", False))
              if getattr(config, key) != default]  # fmt: skip
    if given:
        raise UserError(f"backbone.{given[0]} is for Vision Transformers; {config.name} is none, leave it away")
    sized = {"img_size": list(size)} if "img_size" in _parameters(config.name) else {}
    stride = {} if config.last_stride is None else {"last_stride": config.last_stride}
    return {"model_name": config.name, "num_classes": 0, **sized, **stride}


def _parameters(name: str) -> set[str]:
    """Keyword arguments of the class behind a name of timm, as far as its module tells: those of its largest class."""
    module = inspect.getmodule(timm.model_entrypoint(name))
    classes = [each for _, each in inspect.getmembers(module, inspect.isclass) if each.__module__ == module.__name__]
    return {key for each in classes if hasattr(each, "forward_features") for key in inspect.signature(each).parameters}


def build(arguments: dict[str, Any], drop_path: float = 0.0) -> "Backbone | TimmBackbone":
    """The backbone of those arguments; weights are timm's random ones, to be loaded or initialised."""
    if is_vit(arguments["model_name"]):
        return Backbone(arguments, drop_path=drop_path)
    return TimmBackbone(arguments, drop_path)


class TimmBackbone(nn.Module):
    """A model of timm that is no plain ViT. `self.model` is timm's; its own pooling gives `cls`. `grid`: rows and
    columns of its features, at 256 x 128 where it takes any size.

    arguments: model_name and timm's keyword arguments; "last_stride" is ours. The random numbers of its stochastic
    depth are torch's own: the loop seeds them before each step.
    """

    def __init__(self, arguments: dict[str, Any], drop_path: float = 0.0):
        super().__init__()
        self.arguments, self.drops = arguments, []
        given = dict(arguments)
        name, stride = given.pop("model_name"), given.pop("last_stride", None)
        if drop_path:
            given["drop_path_rate"] = drop_path
        try:
            self.model = timm.create_model(name, pretrained=False, **given)
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            hint = " (does it have stochastic depth? else set backbone.drop_path=0)" if drop_path else ""
            raise UserError(f"timm refuses to build {name!r} with {given}: {error}{hint}") from error
        if stride is not None:
            self._set_last_stride(name, stride)
        self.eval()  # else the zeros below would move the running statistics
        with torch.no_grad():
            features, places = self._maps(torch.zeros(1, 3, *arguments.get("img_size", (256, 128))))
            self.dim: int = self.model.forward_head(features, pre_logits=True).shape[1]
        self.grid = tuple(self._rows_and_columns(features)) if features.ndim == 4 else (places.shape[1], 1)
        self.train()

    def _set_last_stride(self, name: str, stride: int) -> None:
        """Stride of the last stage without dilation, as BoT sets it; timm's output_stride would dilate."""
        if not isinstance(self.model, ResNet):
            raise UserError(f"backbone.last_stride is for ResNets; {name} is none, leave it away")
        if stride == 2:
            return  # as timm has it
        block = self.model.layer4[0]
        (block.conv2 if isinstance(block, Bottleneck) else block.conv1).stride = (1, 1)
        for place, layer in enumerate(block.downsample):
            if isinstance(layer, nn.AvgPool2d):
                block.downsample[place] = nn.Identity()  # as timm builds a block of stride 1
            elif isinstance(layer, nn.Conv2d):
                layer.stride = (1, 1)

    def _rows_and_columns(self, features: Tensor) -> torch.Size:
        return features.shape[1:3] if getattr(self.model, "output_fmt", "NCHW") == "NHWC" else features.shape[2:]

    def _maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """timm's features, and the same as [B, N, C] without prefix tokens."""
        features = self.model.forward_features(images)
        if features.ndim == 3:
            return features, features[:, getattr(self.model, "num_prefix_tokens", 0) :]
        channels_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
        return features, features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)

    def forward(
        self,
        images: Tensor,
        drops: Tensor | None = None,
        added: Tensor | None = None,
        patches: Literal["all", "none"] = "all",
    ) -> Tokens:
        """images float [B, 3, H, W]. The other arguments are for Backbone's callers: drops has no column here, and
        nothing can be added, because there are no tokens before the first block."""
        assert added is None, "sie and jpm are refused when the method is built"
        features, places = self._maps(images)
        return Tokens(self.model.forward_head(features, pre_logits=True), places)


def load(ckpt: str, wanted: dict[str, Any], drop_path: float) -> tuple[TimmBackbone, dict[str, Any]]:
    """The backbone of the arguments `wanted` with weights of `ckpt`, and what is known about them.

    ckpt: timm:NAME, pretrained weights that timm has or fetches; or a model that finetune/run.py wrote. Strict: a
    UserError names what does not fit.
    """
    backbone = TimmBackbone(wanted, drop_path)
    if ckpt.startswith(TIMM):
        name = ckpt.removeprefix(TIMM)
        try:
            found = timm.create_model(name, pretrained=True, num_classes=0)
        except (OSError, RuntimeError, ValueError, TypeError) as error:  # no connection is an OSError
            told = " ".join(str(error).split())[:200]
            raise UserError(f"{ckpt}: timm cannot give these weights ({told}); without a connection, fetch them "
                            "elsewhere") from error  # fmt: skip
        tensors, cfg = found.state_dict(), found.pretrained_cfg
        stored = {"normalize": {key: list(cfg[key]) for key in ("mean", "std")}}
    else:
        tensors, stored = load_model(ckpt)
        prefix = "backbone.model."
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    try:
        backbone.model.load_state_dict(tensors)
    except RuntimeError as error:
        told = " ".join(str(error).split())[:300]
        raise UserError(f"--ckpt {ckpt} does not fit backbone.name = {wanted['model_name']!r}: {told}") from error
    return backbone, stored
