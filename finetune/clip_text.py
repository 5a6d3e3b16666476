"""The text tower of CLIP (Radford et al. 2021, arXiv 2103.00020, section 2.4): vectors of words from a local file.

It is needed once, before a training: a frozen table of its answers is all that text search uses. Byte pairs as in
Sennrich et al. 2016 (arXiv 1508.07909), on bytes (Radford et al. 2019): a word becomes the pieces that the list of
merges joins; between a start and an end mark they go through a causal transformer, whose last answer is projected.
"""

import gzip
import itertools
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune import clip_files
from recipes.errors import UserError

HEAD = 64  # numbers of an attention head, in every published CLIP
END = "</w>"  # closes the last piece of a word
BATCH = 512  # words in one forward
MOST_BYTES = 16 << 20  # of a list of merges, unpacked; CLIP's has 3.2 MB
NEEDED = ("token_embedding.weight", "positional_embedding", "ln_final.weight", "ln_final.bias", "text_projection")


def byte_letters() -> dict[int, str]:
    """A printable letter for each of the 256 bytes, in the order in which CLIP numbers them: first the bytes that are
    printable themselves, then the others as the letters from number 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


class BytePairs:
    """Words -> numbers of pieces. merges: pairs of pieces, the first to be joined first."""

    def __init__(self, merges: Sequence[tuple[str, str]]):
        self.letters = byte_letters()
        single = self.letters.values()
        pieces = [*single, *(letter + END for letter in single), *("".join(pair) for pair in merges)]
        self.numbers = {piece: number for number, piece in enumerate(pieces)}
        self.turns = {pair: number for number, pair in reversed(list(enumerate(merges)))}
        self.start, self.end = len(pieces), len(pieces) + 1

    def pieces(self, word: str) -> list[str]:
        """The pieces of a word: the pair that stands first in the list is joined, everywhere, until none is left."""
        found = [self.letters[byte] for byte in word.encode()]
        found[-1] += END
        while len(found) > 1:
            best = min(itertools.pairwise(found), key=lambda pair: self.turns.get(pair, len(self.turns)))
            if best not in self.turns:
                break
            joined, place = [], 0
            while place < len(found):
                both = tuple(found[place : place + 2]) == best
                joined.append("".join(best) if both else found[place])
                place += 1 + both
            found = joined
        return found

    def encode(self, word: str) -> list[int]:
        """Start mark, pieces, end mark."""
        return [self.start, *(self.numbers[piece] for piece in self.pieces(word)), self.end]


def read_merges(path: Path, count: int) -> list[tuple[str, str]]:
    """The first `count` merges of CLIP's list, plain or gzip; its first line is a heading."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
        lines = data.decode("utf-8").split("\n")[1 : count + 1]
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as CLIP's list of byte pairs ({error}); fetch it again") from error
    pairs = [tuple(line.split()) for line in lines]
    if len(data) > MOST_BYTES or len(pairs) < count or any(len(pair) != 2 for pair in pairs):
        raise UserError(f"{path} does not hold the {count:,} byte pairs, one a line, that the CLIP file was made with")
    return pairs


class Tower(NamedTuple):
    """The tensors of a text tower, under CLIP's names."""

    tensors: Mapping[str, Tensor]
    layers: int
    width: int

    @property
    def merges(self) -> int:
        """Byte pairs that belong to its pieces: what is not one of 2 x 256 letters or of the two marks."""
        return len(self.tensors["token_embedding.weight"]) - 2 * 256 - 2


def tower_of(state: Mapping[str, Tensor], where: str) -> Tower:
    """The text tower in a CLIP state dict, in float32. UserError naming what is missing or has another shape."""
    missing = [name for name in NEEDED if name not in state]
    if missing:
        raise UserError(f"{where} holds no text tower of CLIP: {missing[0]} is missing")
    width, prefix = state["ln_final.weight"].shape[0], "transformer.resblocks."
    numbers = [name.removeprefix(prefix).partition(".")[0] for name in state if name.startswith(prefix)]
    layers = 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)
    block = {
        **{"attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,)},
        **{"attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,)},
        **{f"{norm}.{part}": (width,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")},
        **{"mlp.c_fc.weight": (4 * width, width), "mlp.c_fc.bias": (4 * width,)},
        **{"mlp.c_proj.weight": (width, 4 * width), "mlp.c_proj.bias": (width,)},
    }
    wanted = {f"{prefix}{layer}.{name}": shape for layer in range(layers) for name, shape in block.items()}
    for name in ("token_embedding.weight", "positional_embedding"):
        wanted[name] = (state[name].shape[0], width)
    wanted |= {"ln_final.bias": (width,), "text_projection": (width, state["text_projection"].shape[-1])}
    for name, shape in wanted.items():
        found = tuple(state[name].shape) if name in state else None
        if found != shape:
            raise UserError(f"{where}: {name} of the text tower should have the shape {shape}, and has {found}")
    if not layers or width % HEAD or len(state["token_embedding.weight"]) < 2 * 256 + 2:
        raise UserError(f"{where}: {layers} layers of width {width} are no text tower of CLIP")
    return Tower({name: state[name].float() for name in (*wanted, "ln_final.weight")}, layers, width)


def encode(tower: Tower, numbers: Tensor, ends: Tensor) -> Tensor:
    """Projected answers at the end marks, float32 [B, D].

    numbers: int64 [B, L], pieces with both marks; whatever stands behind an end mark is not looked at. ends: int64 [B],
    the place of each end mark. L is at most the positions that the tower has.
    """
    t, heads = tower.tensors, tower.width // HEAD
    x = t["token_embedding.weight"][numbers] + t["positional_embedding"][: numbers.shape[1]]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (tower.width,), t[f"{name}.weight"], t[f"{name}.bias"])

    for layer in range(tower.layers):
        own = f"transformer.resblocks.{layer}"
        joint = F.linear(norm(x, f"{own}.ln_1"), t[f"{own}.attn.in_proj_weight"], t[f"{own}.attn.in_proj_bias"])
        q, k, v = (part.unflatten(2, (heads, HEAD)).transpose(1, 2) for part in joint.chunk(3, dim=2))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + F.linear(mixed, t[f"{own}.attn.out_proj.weight"], t[f"{own}.attn.out_proj.bias"])
        wide = F.linear(norm(x, f"{own}.ln_2"), t[f"{own}.mlp.c_fc.weight"], t[f"{own}.mlp.c_fc.bias"])
        wide = wide * torch.sigmoid(1.702 * wide)  # QuickGELU
        x = x + F.linear(wide, t[f"{own}.mlp.c_proj.weight"], t[f"{own}.mlp.c_proj.bias"])
    return norm(x[torch.arange(len(x)), ends], "ln_final") @ t["text_projection"]


@torch.no_grad()
def word_vectors(file: Path, merges: Path, words: Sequence[str]) -> np.ndarray:
    """Each word alone through the text tower of a CLIP file: float32 [W, D], not normalised.

    A word of more pieces than the tower has positions is cut. UserError where a file is missing or is another thing.
    """
    tower = tower_of(clip_files.read(file), str(file))
    pairs = BytePairs(read_merges(merges, tower.merges))
    context, found = len(tower.tensors["positional_embedding"]), []
    for start in range(0, len(words), BATCH):
        pieces = [pairs.encode(word) for word in words[start : start + BATCH]]
        pieces = [own if len(own) <= context else [*own[: context - 1], pairs.end] for own in pieces]
        ends = torch.tensor([len(own) - 1 for own in pieces])
        numbers = torch.full((len(pieces), int(ends.max()) + 1), pairs.end)
        for row, own in enumerate(pieces):
            numbers[row, : len(own)] = torch.tensor(own)
        found.append(encode(tower, numbers, ends).numpy())
    return np.concatenate(found)
