"""Crops of several sizes through one forward.

The tokens of all crops lie one after the other, [T, D], so every linear layer, norm and activation runs once; only the
attention knows which tokens belong together. The idea is that of DINOv2's nested tensors (arXiv 2304.07193, section 5).
"""

import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

Kernel = Literal["plain", "fused", "varlen"]


class Span(NamedTuple):
    """Sequences of one length that lie together."""

    count: int
    length: int  # tokens of a sequence
    cls_only: bool = False  # attention: only the first token asks, the answer has one row a sequence


Layout = tuple[Span, ...]


class Depth(NamedTuple):
    """Stochastic depth of one residual branch in one forward: which sequences it is dropped for.

    Either the branch runs for all and is multiplied by `factor`, or it runs for the kept tokens alone.
    """

    factor: Tensor | None  # [T, 1]: 0 where dropped, else 1 / (1 - rate)
    rows: Tensor | None = None  # int64 [R]: the kept tokens
    layout: Layout = ()  # of the kept tokens
    scale: float = 1.0  # 1 / (1 - rate)


def tokens_of(layout: Layout) -> int:
    """T, tokens of all sequences."""
    return sum(span.count * span.length for span in layout)


@lru_cache(maxsize=256)
def borders(layout: Layout, device: torch.device) -> Tensor:
    """Where each sequence begins, and the end: int32 [sequences + 1]."""
    lengths = torch.cat([torch.full((span.count,), span.length, dtype=torch.int32) for span in layout])
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)).to(device)


def _grouped(attn: Attention, qkv: Tensor, layout: Layout, fused: bool) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, one batched product for each span. qkv [T, 3, heads, d] -> [rows, heads * d]."""
    answers, start = [], 0
    for span in layout:
        part = qkv[start : start + span.count * span.length].unflatten(0, (span.count, span.length))
        start += span.count * span.length
        q, k, v = part.permute(2, 0, 3, 1, 4).unbind(0)  # each [count, heads, length, d]
        q = attn.q_norm(q[:, :, :1] if span.cls_only else q)
        k = attn.k_norm(k)
        if fused:
            answer = F.scaled_dot_product_attention(q, k, v, scale=attn.scale)
        else:
            answer = ((q * attn.scale) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        answers.append(answer.transpose(1, 2).flatten(2).flatten(0, 1))
    return answers[0] if len(answers) == 1 else torch.cat(answers)


def _varlen(attn: Attention, qkv: Tensor, layout: Layout) -> Tensor:
    """The same by one flash-attention call over sequences of all lengths; CUDA, 16 bit."""
    from torch.nn.attention.varlen import varlen_attn  # only where there is CUDA

    q, k, v = qkv.unbind(1)  # each [T, heads, d]
    asking = tuple(span._replace(length=1) if span.cls_only else span for span in layout)
    if any(span.cls_only for span in layout):
        parts = q.split([span.count * span.length for span in layout])
        q = torch.cat(
            [part[:: span.length] if span.cls_only else part for part, span in zip(parts, layout, strict=True)]
        )
    ends, asking_ends = borders(layout, qkv.device), borders(asking, qkv.device)
    longest = max(span.length for span in layout)
    q, k = attn.q_norm(q) * (attn.scale * q.shape[-1] ** 0.5), attn.k_norm(k)  # the kernel divides by sqrt(d) itself
    answer = varlen_attn(q.to(v.dtype), k.to(v.dtype), v, asking_ends, ends, max(s.length for s in asking), longest)
    return answer.flatten(1)


def attention(attn: Attention, x: Tensor, layout: Layout, kernel: Kernel) -> Tensor:
    """Self-attention inside each sequence. x [T, D] -> [T, heads * d], before the projection.

    A span with `cls_only` gives one row a sequence instead of `length`.
    """
    qkv = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1))
    return _varlen(attn, qkv, layout) if kernel == "varlen" else _grouped(attn, qkv, layout, kernel == "fused")


def _add(x: Tensor, branch: Callable[[Tensor, Layout], Tensor], layout: Layout, depth: Depth | None) -> Tensor:
    """x + branch(x), the branch dropped as `depth` says."""
    if depth is None:
        return x + branch(x, layout)
    if depth.rows is not None:
        return x.index_add(
            0, depth.rows, branch(x.index_select(0, depth.rows), depth.layout).to(x.dtype), alpha=depth.scale
        )
    return torch.addcmul(x, branch(x, layout).to(x.dtype), depth.factor)


def project(attn: Attention, answer: Tensor) -> Tensor:
    """The rest of timm's attention, after softmax(q k^T) v."""
    return attn.proj_drop(attn.proj(attn.norm(answer)))


def run_block(
    block: Block, x: Tensor, layout: Layout, kernel: Kernel, first: Depth | None, second: Depth | None
) -> Tensor:
    """A timm block on packed tokens [T, D]; first, second: stochastic depth of its attention and of its MLP."""

    def attend(tokens: Tensor, inside: Layout) -> Tensor:
        return block.ls1(project(block.attn, attention(block.attn, block.norm1(tokens), inside, kernel)))

    x = _add(x, attend, layout, first)
    return _add(x, lambda tokens, _: block.ls2(block.mlp(block.norm2(tokens))), layout, second)


def run_last_block(
    block: Block, x: Tensor, layout: Layout, kernel: Kernel, wanted: tuple[Tensor, Tensor], factors: tuple
) -> Tensor:
    """The last block where only some of its outputs are read: all tokens are keys and values, the rest of the block
    runs on the wanted rows alone. Exact, not an approximation.

    layout: with `cls_only` where of a span only CLS is wanted. wanted: int64 [R] twice: the rows of x, and the same
    rows of the attention's answer. factors: of both branches, [T, 1] or None. Returns [R, D].
    """
    rows, answered = wanted
    first, second = (None if factor is None else Depth(factor.index_select(0, rows)) for factor in factors)
    answer = attention(block.attn, block.norm1(x), layout, kernel).index_select(0, answered)
    x = _add(x.index_select(0, rows), lambda *_: block.ls1(project(block.attn, answer)), layout, first)
    return _add(x, lambda tokens, _: block.ls2(block.mlp(block.norm2(tokens))), layout, second)


def kept(draws: Tensor, rate: float, layout: Layout, device: torch.device) -> Depth:
    """The tokens whose sequence keeps its branch: draws >= rate. draws: float [sequences], on the host."""
    keep, spans, rows, start, first = draws >= rate, [], [], 0, 0
    for span in layout:
        which = keep[first : first + span.count].nonzero()  # on the host, so the device is not waited for
        rows.append((start + which * span.length + torch.arange(span.length)).flatten())
        spans.append(Span(len(which), span.length))
        first, start = first + span.count, start + span.count * span.length
    # an empty span would be an empty batch for some kernels
    full = tuple(span for span in spans if span.count)
    return Depth(None, torch.cat(rows).to(device, non_blocking=True), full, 1 / (1 - rate))


@lru_cache
def kernel_for(device: torch.device, dtype: torch.dtype) -> Kernel:
    """The attention for a device and the type of its products.

    On CPUs fused attention is several times slower than plain products in bf16 at these lengths, and equal in float32.
    On GPUs that have flash attention one call takes the sequences of all lengths; it is tried against the fused one
    first, and where it does not give the same the fused one is taken and a warning says so.
    """
    if device.type != "cuda":
        return "plain"
    if dtype not in (torch.bfloat16, torch.float16) or torch.cuda.get_device_capability(device) < (8, 0):
        return "fused"
    fault = _varlen_fault(device, dtype)
    if fault:
        print(
            f"warning: variable-length attention is not used, fused attention is: {fault}", file=sys.stderr, flush=True
        )
    return "fused" if fault else "varlen"


def _varlen_fault(device: torch.device, dtype: torch.dtype) -> str:
    """Why variable-length attention cannot be used; empty when it agrees with the fused one, gradients too."""
    attn = Attention(128, num_heads=2, qkv_bias=True)
    for parameter in attn.parameters():  # not torch's generator, whose state belongs to the run
        parameter.data.copy_(torch.linspace(-1, 1, parameter.numel()).sin().view_as(parameter) / 8)
    attn = attn.to(device, dtype)
    layout = (Span(3, 33), Span(4, 7, cls_only=True))
    x = torch.linspace(0, 400, tokens_of(layout) * 128).sin().view(-1, 128).to(device, dtype)
    found = []
    for kernel in ("varlen", "fused"):
        tokens = x.clone().requires_grad_()
        try:
            answer = attention(attn, tokens, layout, kernel)
            answer.float().square().sum().backward()
        except (ImportError, RuntimeError) as error:
            return str(error).splitlines()[0]
        found.append((answer, tokens.grad))
    for ours, theirs in zip(*found, strict=True):
        difference = (ours - theirs).float().norm() / theirs.float().norm()
        if not difference < 0.02:  # bf16 keeps 8 bits
            return f"its result differs by {float(difference):.1%}"
    return ""


def is_plain(block: nn.Module) -> bool:
    """Whether `run_block` computes what the block's own forward computes."""
    return type(block) is Block and type(block.attn) is Attention and getattr(block.attn, "gate", None) is None
