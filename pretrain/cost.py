"""What a step costs, from its sizes alone: floating-point operations, memory of a device, bytes on disk.

A multiply-add counts as 2 FLOP. Norms, activations, softmax and the optimiser are left out, as is the custom where a
model FLOP utilisation (MFU) is told.
"""

import copy
import functools
import math
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.backbone import SKIPPING_PAYS, Backbone
from pretrain.checkpoint import CheckpointConfig
from pretrain.heads import HeadsConfig
from pretrain.losses import PART
from pretrain.masks import MasksConfig, draw_mask
from pretrain.showing import PicturesConfig
from pretrain.views import Size, ViewsConfig

MASKS_DRAWN = 2000  # for the mean number of masked patches; its standard error is 1 % then
FULL = 4  # bytes of a float32
# share and bytes that come on top. CPU: the growth of a process was 16 to 32 % above the other items (four sizes, tried
# once). CUDA: an assumption, context and libraries included
SPARE = {"cpu": (0.25, 0.0), "cuda": (0.1, 1.5e9)}
PICTURES = 500_000  # bytes of the pictures of an image after a snapshot, twice: PNG files, and in TensorBoard's
LOG_LINE = 1500  # bytes of a line in metrics.jsonl and of the same values for TensorBoard


class Sizes(NamedTuple):
    """What the cost depends on. g, l: of a global, of a local crop."""

    dim: int  # D
    heads: int
    hidden: int  # of the MLP of a block
    depth: int  # blocks of the teacher
    blocks: float  # blocks of the student but the last, less what stochastic depth skips
    prefix: int  # tokens beside the patches: CLS and registers
    patches: tuple[int, int]  # g, l
    first: tuple[int, int]  # multiply-adds of the first convolution: g, l
    stem: tuple[int, int]  # multiply-adds of the other convolutions before the blocks: g, l
    maps: tuple[int, int]  # numbers that come out of all these convolutions but the last: g, l
    pixels: tuple[int, int]  # g, l
    locals: int  # L
    masked: float  # mean number of masked patches of an image, both global crops together; 0 without the MIM term
    mim: bool

    @property
    def tokens(self) -> tuple[int, int]:
        """Length of a sequence: g, l."""
        return self.patches[0] + self.prefix, self.patches[1] + self.prefix

    @property
    def rows(self) -> float:
        """Tokens of an image whose output the student's loss reads: CLS of all crops, the masked patches."""
        return 2 + self.locals + self.masked


@functools.cache
def masked_share(config: MasksConfig, grid: tuple[int, int]) -> float:
    """Mean share of the patches of a global crop that are masked, in 0..1, from masks drawn with a fixed seed."""
    rng = np.random.default_rng(0)
    return float(np.mean([draw_mask(rng, grid, config).mean() for _ in range(MASKS_DRAWN)]))


def convolutions(stem: nn.Module, size: Size) -> list[tuple[int, int]]:
    """Of each convolution of a stem for one image of that size: multiply-adds, numbers that come out.

    Found on a copy without data, on torch's meta device, so that any stem is counted as it runs.
    """
    found: list[tuple[int, int]] = []

    def note(layer: nn.Module, _: Any, out: Tensor) -> None:
        found.append((out[0, 0].numel() * layer.weight.numel(), out.numel()))

    copied = copy.deepcopy(stem).to("meta").eval()
    for layer in copied.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(note)
    copied(torch.empty(1, 3, *size, device="meta"))
    return found


def sizes(
    backbone: Backbone, views: ViewsConfig, masks: MasksConfig, mim: bool, where: tuple[str, torch.dtype]
) -> Sizes:
    """The sizes of a student. mim: whether there is a MIM term. where: "cuda" or "cpu", and type of the products."""
    vit, block = backbone.vit, backbone.vit.blocks[0]
    crops = (views.global_size, views.local_size)
    patch_h, patch_w = vit.patch_embed.patch_size
    stems = [convolutions(vit.patch_embed, size) for size in crops]
    skips = [backbone.skips_samples and rate >= SKIPPING_PAYS[where] for rate in backbone.drops[:-2]]
    grid = backbone.grid
    return Sizes(
        dim=backbone.dim,
        heads=block.attn.num_heads,
        hidden=block.mlp.fc1.out_features,
        depth=len(vit.blocks),
        blocks=sum(1 - rate * skip for rate, skip in zip(backbone.drops, skips, strict=False)) / 2,
        prefix=vit.num_prefix_tokens,
        patches=tuple((height // patch_h) * (width // patch_w) for height, width in crops),
        first=tuple(layers[0][0] for layers in stems),
        stem=tuple(sum(macs for macs, _ in layers[1:]) for layers in stems),
        maps=tuple(sum(out for _, out in layers[:-1]) for layers in stems),
        pixels=tuple(height * width for height, width in crops),
        locals=views.local_count,
        masked=masked_share(masks, grid) * 2 * grid[0] * grid[1] if mim else 0.0,
        mim=mim,
    )


def _block(s: Sizes, tokens: float) -> float:
    """Multiply-adds of a block on one sequence: query, key, value and projection, MLP, attention."""
    return tokens * (4 * s.dim**2 + 2 * s.dim * s.hidden) + 2 * tokens**2 * s.dim


def _last(s: Sizes, tokens: float, asking: float) -> float:
    """Of the last block as far as all tokens pass it: query, key, value; attention of `asking` tokens over all."""
    return tokens * 3 * s.dim**2 + 2 * asking * tokens * s.dim


def step_flops(s: Sizes, head: HeadsConfig, textbook: bool = False) -> dict[str, float]:
    """FLOP of one training step for one image, item by item: the student's forward and backward, the teacher's forward.

    The backward costs twice the forward, but for the first convolution, whose input needs no gradient. The student's
    last block and head run on the tokens that the loss reads, the teacher's prototypes on CLS and masked patches.
    textbook: as iBOT's code does it: everything on all tokens of the global crops, nothing skipped.
    """
    g, l = s.tokens  # noqa: E741 - as in the paper
    after = s.dim**2 + 2 * s.dim * s.hidden  # of a row of the last block: projection and MLP
    widths = [s.dim, *[head.hidden_dim] * (head.layers - 1), head.bottleneck_dim]
    mlp = sum(a * b for a, b in pairwise(widths))
    logits = head.bottleneck_dim * head.out_dim
    if textbook:
        blocks, rows = s.depth, 2 + s.locals + (2 * s.patches[0] if s.mim else 0)
        wide, narrow, last_rows = 0.0, 0.0, 0.0
        teacher_blocks = s.depth * 2 * _block(s, g)
        teacher_rows = 2 + (2 * s.patches[0] if s.mim else 0)
    else:
        blocks, rows = s.blocks, s.rows
        wide, narrow = 2 * _last(s, g, g if s.mim else 1), s.locals * _last(s, l, 1)
        last_rows = rows * after
        # the centre of the patches needs all of them; without the MIM term CLS is enough
        last = 2 * _block(s, g) if s.mim else 2 * (_last(s, g, 1) + after)
        teacher_blocks = (s.depth - 1) * 2 * _block(s, g) + last
        teacher_rows = 2 + s.masked
    teacher_mlp_rows = 2 + 2 * s.patches[0] if s.mim else 2
    first, stem = (2 * pair[0] + s.locals * pair[1] for pair in (s.first, s.stem))
    items = {
        "student, images to tokens": 2 * first + 3 * stem,
        "student, blocks, global crops": 3 * (blocks * 2 * _block(s, g) + wide),
        "student, blocks, local crops": 3 * (blocks * s.locals * _block(s, l) + narrow),
        "student, last block's MLP": 3 * last_rows,
        "student, head": 3 * rows * mlp,
        "student, prototypes": 3 * rows * logits,
        "teacher, backbone": 2 * (s.first[0] + s.stem[0]) + teacher_blocks,
        "teacher, head": teacher_mlp_rows * mlp,
        "teacher, prototypes": teacher_rows * logits,
    }
    return {name: 2.0 * macs for name, macs in items.items() if macs}


def saved_bytes(s: Sizes, head: HeadsConfig, half: bool, fused: bool) -> dict[str, float]:
    """Bytes that the student's forward keeps for the backward, for one image.

    half: bf16, with a residual stream of float32. fused: attention that keeps no [heads, tokens, tokens]; the plain
    one, which is faster on CPUs, does.
    """
    a = 2 if half else FULL  # of a number that a product reads
    (g, l), dim = s.tokens, s.dim  # noqa: E741
    tokens = 2 * g + s.locals * l
    squares = 2 * g**2 + s.locals * l**2
    # a fused kernel keeps its answer, a scaled copy of the queries and one number a token and head
    attention = tokens * (a * dim + FULL * s.heads) if fused else a * s.heads * squares
    into = tokens * dim * (FULL + a + 3 * a)  # residual stream, after the first norm, query, key, value
    # of a row: the attention's answer, residual stream, after the second norm, the MLP's inside before and after GELU
    branch = (a + FULL + a) * dim + 2 * a * s.hidden
    hidden = 2 * (head.layers - 1) * head.hidden_dim
    # ICS: each map before and after its normalisation, and half of it once more as the input of the instance norm
    maps = 2.5 * a * (2 * s.maps[0] + s.locals * s.maps[1])
    return {
        "images": (2 * s.pixels[0] + s.locals * s.pixels[1]) * 3 * (1 + FULL + a) + maps,
        "blocks": s.blocks * (into + attention + tokens * branch),
        "last block": into + attention + s.rows * (branch + FULL * dim),
        "head": s.rows * (a * (dim + hidden) + (a + 2 * FULL) * head.bottleneck_dim),
    }


def step_memory(
    s: Sizes, head: HeadsConfig, counts: tuple[int, int], images: int, half: bool, gpu: bool
) -> dict[str, float]:
    """Bytes of a device at the peak of a step, item by item: about when the backward begins.

    counts: parameters of the student, of the teacher. images: of a micro-batch. half: see `saved_bytes`. gpu: fused
    attention, and what CUDA itself takes. The same on any number of devices: DDP reduces the gradients where they lie.
    """
    student, teacher = counts
    logits = head.out_dim * FULL * images
    items = {
        "weights of student and teacher": FULL * (student + teacher) + (2 * student if half else 0),
        "gradients": FULL * student,
        "AdamW": 2 * FULL * student,
        "activations": images * sum(saved_bytes(s, head, half, gpu).values()),
        # the student's logits, their log-softmax and two gradients of that size; the teacher's logits and targets
        "logits": 4 * (2 + s.locals) * logits + 2 * (2 + s.masked) * logits + 2 * PART * FULL,
    }
    share, fixed = SPARE["cuda" if gpu else "cpu"]
    return items | {"temporary, and lost by the allocator": fixed + share * sum(items.values())}


def tensor_bytes(tensors: dict[str, Any]) -> int:
    """Bytes of the tensors of a state dict."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def state_bytes(modules: dict[str, nn.Module]) -> int:
    """Bytes of a checkpoint: all modules by name, and AdamW's two moments of what learns in modules["student"]."""
    learning = [p for p in modules["student"].parameters() if p.requires_grad]
    moments = sum(2 * p.numel() * p.element_size() + FULL for p in learning)  # and each one's count of steps
    return moments + sum(tensor_bytes(module.state_dict()) for module in modules.values())


def folder_bytes(
    modules: dict[str, nn.Module],
    kept: CheckpointConfig,
    steps: int,
    steps_per_epoch: float,
    log_every: int,
    pictures: PicturesConfig,
) -> float:
    """Bytes of a run folder at the end, or a little more than that: full states, teachers, pictures, the log.

    While a state is written there is one more of them.
    """
    states = min(kept.keep, max(1, math.ceil(steps / (kept.every_epochs * steps_per_epoch))))
    teachers = 1 + int(steps / (kept.teacher_every_epochs * steps_per_epoch))
    drawn = teachers * pictures.images * PICTURES
    if kept.teacher_newest_every_epochs:
        teachers += min(kept.teacher_newest, int(steps / (kept.teacher_newest_every_epochs * steps_per_epoch)))
    teacher = tensor_bytes(modules["teacher"].backbone.vit.state_dict())
    return states * state_bytes(modules) + teachers * teacher + drawn + steps // log_every * LOG_LINE
