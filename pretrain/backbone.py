"""timm's Vision Transformer on rectangular images, with masked patches and per-sample drop path."""

import collections
import json
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import timm
import torch
from pydantic import Field
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pretrain.packing import Depth, Layout, Span, is_plain, kept, kernel_for, run_block, run_last_block, tokens_of
from pretrain.positions import resize_positions
from pretrain.stem import ICSStem
from recipes.errors import UserError
from recipes.load import Section

Init = Literal["truncated_normal", "fan_in"]


class BackboneConfig(Section):
    """A Vision Transformer by its timm name; the sizes below override the named ones where given."""

    name: str = "vit_small_patch16_224"
    patch_size: int = Field(16, ge=1)  # pixels
    embed_dim: int | None = Field(None, ge=1)  # None: of the named model
    depth: int | None = Field(None, ge=1)  # blocks
    num_heads: int | None = Field(None, ge=1)
    drop_path: float = Field(0.1, ge=0, lt=1)  # of the last block; grows linearly from 0
    init: Init = "truncated_normal"  # std 0.02, or linear layers at 1/sqrt(fan_in), better for narrow models
    stem: Literal["patch", "ics"] = "patch"  # one convolution, or the convolutions with IBN of TransReID-SSL
    registers: int = Field(0, ge=0)  # extra tokens beside CLS (arXiv 2309.16588)
    compile: bool = False  # torch.compile of each block: minutes at the start; gains on GPUs, not on CPUs


class Tokens(NamedTuple):
    """Output of the backbone after the final norm. D = embedding dimension."""

    cls: Tensor  # [B, D]
    patches: Tensor  # [B, N, D], row by row over the grid; or [M, D], those that were asked for
    registers: Tensor | None = None  # [B, R, D], where all tokens were asked for


def init_linear(module: nn.Module, how: Init) -> None:
    """Start every linear layer: weights truncated normal of std 0.02 or 1/sqrt(fan_in) (cut at +-2 std), biases 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            std = 0.02 if how == "truncated_normal" else layer.in_features**-0.5
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def timm_arguments(config: BackboneConfig, image_size: tuple[int, int]) -> dict[str, Any]:
    """What to give `timm.create_model` so that the exported weights load: name and keyword arguments.

    image_size: height, width in pixels. Raises UserError when patches do not tile it.
    """
    if any(side % config.patch_size for side in image_size):
        height, width = image_size
        raise UserError(
            f"images of {height} x {width} pixels cannot be cut into patches of backbone.patch_size = "
            f"{config.patch_size}; make height and width multiples of it"
        )
    given = {k: getattr(config, k) for k in ("embed_dim", "depth", "num_heads") if getattr(config, k) is not None}
    if config.registers:
        given["reg_tokens"] = config.registers
    if config.stem != "patch":
        given["stem"] = config.stem  # ours, see create_vit
    size = {"img_size": list(image_size), "patch_size": config.patch_size, "dynamic_img_size": True}
    return {"model_name": config.name, "num_classes": 0, **size, **given}


def create_vit(arguments: dict[str, Any]) -> VisionTransformer:
    """The timm model of those arguments; "stem" among them is ours. UserError when timm has no such plain ViT."""
    arguments = dict(arguments)
    name, stem = arguments.pop("model_name"), arguments.pop("stem", "patch")
    if not timm.is_model(name):
        raise UserError(f"backbone.name = {name!r} is no timm model; see timm.list_models('vit*')")
    try:
        vit = timm.create_model(name, pretrained=False, **arguments)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"timm refuses to build {name!r} with {json.dumps(arguments)}: {error}") from error
    if not (isinstance(vit, VisionTransformer) and all(is_plain(block) for block in vit.blocks)):
        raise UserError(f"backbone.name = {name!r} is not a plain Vision Transformer; choose a timm model 'vit_*'")
    if vit.cls_token is None:
        raise UserError(f"backbone.name = {name!r} has no class token, which DINO needs; choose another timm model")
    if stem == "ics":
        vit.patch_embed = ICSStem(tuple(arguments["img_size"]), arguments["patch_size"], vit.embed_dim)
    return vit


class Backbone(nn.Module):
    """A timm ViT that returns Tokens.

    arguments: see `timm_arguments`. `self.vit` is the timm model: its state dict is what gets exported. `self.drops`:
    the rates of stochastic depth, of the attention and of the MLP of each block in turn.
    """

    def __init__(self, arguments: dict[str, Any], masked: bool = False, drop_path: float = 0.0, compiled: bool = False):
        super().__init__()
        self.arguments = arguments
        self.vit = create_vit(arguments)
        self.dim: int = self.vit.embed_dim
        self.grid: tuple[int, int] = tuple(self.vit.patch_embed.grid_size)
        self.mask_embedding = nn.Parameter(torch.zeros(1, self.dim)) if masked else None
        depth = len(self.vit.blocks)
        self.drops = [drop_path * index / max(depth - 1, 1) for index in range(depth) for _ in range(2)]
        self.run_block = torch.compile(run_block) if compiled else run_block
        self.skips_samples = not compiled  # how many are kept changes with the batch: a compiled block would not
        self._resizing: dict[tuple, Tensor] = {}

    def initialise(self, how: Init) -> None:
        """Fresh weights, drawn from torch's current generator: tokens and positions std 0.02, norms at 1 and 0."""
        init_linear(self.vit, how)
        for parameter in (self.vit.cls_token, self.vit.pos_embed, self.vit.reg_token):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)

    def forward(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        drops: Tensor | None = None,
        added: Tensor | None = None,
        patches: Literal["all", "none"] = "all",
    ) -> Tokens:
        """images float [B, 3, H, W]; mask bool [B, gh, gw], True = replaced by the mask embedding before the positions
        are added; drops float [B, S] uniform draws for stochastic depth, S = len(self.drops); added float [B, D], added
        to every token before the first block; patches: "none" where CLS alone is wanted."""
        return self.packed([images], mask, None if drops is None else [drops], [patches], added)[0]

    def before(self, block: int, images: Tensor, drops: Tensor | None = None, added: Tensor | None = None) -> Tensor:
        """The tokens [B, L, D] that go into block number `block`, which may count from the end; other arguments as in
        `forward`."""
        x, layout, kernel, depths = self._start([images], None, None if drops is None else [drops], True, added)
        return self._through(self.vit.blocks[:block], x, layout, kernel, depths).unflatten(0, layout[0][:2])

    def through(
        self, tokens: Tensor, blocks: Sequence[nn.Module], drops: Tensor | None, rates: Sequence[float]
    ) -> Tensor:
        """Tokens [B, L, D] through blocks of this network, or copies of them.

        drops: float [B, 2 * blocks] uniform draws, or None. rates: as in `self.drops`, of these blocks.
        """
        layout, x = (Span(*tokens.shape[:2]),), tokens.flatten(0, 1)
        depths: list[Depth | None] = [None] * len(rates)
        if drops is not None and any(rates):
            limits = torch.tensor(rates, device=drops.device)
            kept = ((drops >= limits) / (1 - limits)).to(x.device).repeat_interleave(layout[0].length, dim=0)
            depths = [Depth(factor[:, None]) if rate else None for factor, rate in zip(kept.T, rates, strict=True)]
        kernel = kernel_for(x.device, torch.get_autocast_dtype(x.device.type) if autocasts(x.device) else x.dtype)
        return self._through(blocks, x, layout, kernel, depths).unflatten(0, layout[0][:2])

    def _through(self, blocks: Sequence[nn.Module], x: Tensor, layout: Layout, kernel: str, depths: list) -> Tensor:
        """Tokens [T, D] through whole blocks."""
        for place, block in enumerate(blocks):
            x = self.run_block(block, x, layout, kernel, depths[2 * place], depths[2 * place + 1])
        return x

    def _start(
        self,
        crops: Sequence[Tensor],
        mask: Tensor | None,
        drops: Sequence[Tensor] | None,
        whole: bool,
        added: Tensor | None,
    ) -> tuple[Tensor, Layout, str, list[Depth | None]]:
        """The tokens before the first block [T, D], which belong together, the kernel, and the stochastic depth."""
        pieces = [self._embed(images, mask if place == 0 else None) for place, images in enumerate(crops)]
        if added is not None:
            pieces[0] = pieces[0] + added[:, None].to(pieces[0].dtype)
        layout = tuple(Span(*piece.shape[:2]) for piece in pieces)
        x = pieces[0].flatten(0, 1) if len(pieces) == 1 else torch.cat([piece.flatten(0, 1) for piece in pieces])
        x = self.vit.norm_pre(x)
        precision = torch.get_autocast_dtype(x.device.type) if autocasts(x.device) else x.dtype
        pays = SKIPPING_PAYS[x.device.type, precision] if self.skips_samples else 1.0
        depths = self._depths(None if drops is None else torch.cat(list(drops)), layout, x.device, (whole, pays))
        return x, layout, kernel_for(x.device, precision), depths

    def packed(
        self,
        crops: Sequence[Tensor],
        mask: Tensor | None,
        drops: Sequence[Tensor] | None,
        patches: Sequence[Tensor | Literal["all", "none"]],
        added: Tensor | None = None,
    ) -> list[Tokens]:
        """Crops of several sizes in one forward; equal to one forward for each size.

        crops: float [n, 3, h, w] each. mask, added: of the first ones, see `forward`. drops: float [n, S] each; on the
        host they let the device skip what is dropped. patches: which patch tokens are wanted of each: "all", "none", or
        int64 [M], places in the flattened [n * N]; where not all are, the last block runs on the wanted tokens only.
        """
        whole = all(isinstance(each, str) and each == "all" for each in patches)
        x, layout, kernel, depths = self._start(crops, mask, drops, whole, added)
        *blocks, last = self.vit.blocks
        x = self._through(blocks, x, layout, kernel, depths)
        if whole:
            x = self.vit.norm(self.run_block(last, x, layout, kernel, *depths[-2:]))
            prefix = self.vit.num_prefix_tokens
            ends = [part.unflatten(0, span[:2]) for part, span in zip(split(x, layout), layout, strict=True)]
            return [Tokens(part[:, 0], part[:, prefix:], part[:, 1:prefix]) for part in ends]
        reduced, rows, answered, counts = self._wanted(layout, patches, x.device)
        factors = tuple(None if depth is None else depth.factor for depth in depths[-2:])
        x = self.vit.norm(run_last_block(last, x, reduced, kernel, (rows, answered), factors))
        return [
            Tokens(*part.split(list(count)))
            for part, count in zip(x.split([sum(c) for c in counts]), counts, strict=True)
        ]

    def _embed(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """[n, 3, h, w] -> tokens before the first block [n, prefix + N, D], positions added."""
        vit = self.vit
        x = vit.patch_embed(images)  # [n, gh, gw, D]
        if mask is not None:
            assert self.mask_embedding is not None, "this backbone was built without a mask embedding"
            x = torch.where(mask[..., None], self.mask_embedding.to(x.dtype), x)
        prefix = torch.cat([token for token in (vit.cls_token, vit.reg_token) if token is not None], dim=1)
        positions, grid = vit.pos_embed, tuple(x.shape[1:3])
        own = positions.shape[1] - self.grid[0] * self.grid[1]  # places of the prefix: some models have none for it
        if own:
            prefix = prefix + positions[:, :own]
        x = x.flatten(1, 2) + self._positions(positions[0, own:], grid)
        return torch.cat([prefix.expand(len(x), -1, -1).to(x.dtype), x], dim=1)

    def _positions(self, positions: Tensor, grid: tuple[int, int]) -> Tensor:
        """Of the patches, [N, D], on another grid. Bicubic resizing is linear: a matrix, made once for a grid."""
        if grid == self.grid:
            return positions
        key = (grid, positions.device)
        if key not in self._resizing:
            rows, columns = self.grid
            unit = torch.eye(rows * columns)[None]
            self._resizing[key] = resize_positions(unit, self.grid, grid, 0, "bicubic")[0].to(positions.device)
        with torch.autocast(positions.device.type, enabled=False):
            return self._resizing[key].to(positions.dtype) @ positions

    def _depths(
        self, draws: Tensor | None, layout: Layout, device: torch.device, skipping: tuple[bool, float]
    ) -> list[Depth | None]:
        """Stochastic depth of each residual branch. draws: float [sequences, S]. skipping: whether the last block may
        skip samples too, and from which rate on it pays."""
        if draws is None or not any(self.drops):
            return [None] * len(self.drops)
        rates = torch.tensor(self.drops, device=draws.device)
        factors = ((draws >= rates) / (1 - rates)).T.to(device, non_blocking=True)  # [S, sequences]
        counts = torch.tensor([span.length for span in layout for _ in range(span.count)])
        spread = factors.repeat_interleave(counts.to(device), dim=1, output_size=tokens_of(layout))[..., None]
        depths: list[Depth | None] = [
            Depth(factor) if rate else None for factor, rate in zip(spread, self.drops, strict=True)
        ]
        if draws.device.type == "cpu":
            last, pays = skipping
            for place, rate in enumerate(self.drops if last else self.drops[:-2]):
                if rate >= pays and bool((draws[:, place] >= rate).any()):
                    depths[place] = kept(draws[:, place], rate, layout, device)
        return depths

    def _wanted(
        self, layout: Layout, patches: Sequence[Tensor | str], device: torch.device
    ) -> tuple[Layout, Tensor, Tensor, list[tuple[int, int]]]:
        """For `run_last_block`: its layout, the wanted rows of the tokens and of the attention's answer, and how many
        CLS and patch rows each span has."""
        prefix = self.vit.num_prefix_tokens
        reduced, rows, answered, counts, start, first = [], [], [], [], 0, 0
        for span, wanted in zip(layout, patches, strict=True):
            count, length = span.count, span.length
            only = isinstance(wanted, str) and wanted == "none"
            own = [torch.arange(count, device=device) * length]
            if not only:
                patch_count = length - prefix
                places = torch.arange(count * patch_count, device=device) if isinstance(wanted, str) else wanted
                own.append(places // patch_count * length + prefix + places % patch_count)
            rows += [start + each for each in own]
            answered += [first + (torch.arange(count, device=device) if only else each) for each in own]
            counts.append((count, 0 if only else len(own[1])))
            reduced.append(span._replace(cls_only=only))
            start, first = start + count * length, first + (count if only else count * length)
        return tuple(reduced), torch.cat(rows), torch.cat(answered), counts


# rate of stochastic depth from which skipping the dropped samples is faster than multiplying by zero, by device and
# precision. In float32 on a CPU any: 2 % of a step of ViT-S at a rate of 0.1. In bf16 none there: the products gain
# nothing, and each number of kept samples is a new shape, for which oneDNN builds kernels. On GPUs as DINOv2 found it
SKIPPING_PAYS = collections.defaultdict(lambda: 0.1)
SKIPPING_PAYS["cpu", torch.float32], SKIPPING_PAYS["cpu", torch.bfloat16] = 1e-9, 1.0


def autocasts(device: torch.device) -> bool:
    """Whether products on that device run in another type now."""
    return torch.is_autocast_enabled(device.type)


def split(x: Tensor, layout: Layout) -> tuple[Tensor, ...]:
    """The tokens of each span of packed ones."""
    return x.split([span.count * span.length for span in layout])
