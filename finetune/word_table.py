"""The vector of each word: of a CLIP text tower, of a file, random, or learned (arXiv 2110.10807, section 3.1).

Vectors that are not learned stay as they are. The paper's finding: with the few sentences of these data sets, a text
tower that is fine-tuned forgets what it knew, and fixed vectors of words do not.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from finetune import clip_text
from finetune.words import LONGEST_WORD, MOST_WORDS, PADDING, WIDEST, Lexicon, split_words
from recipes.errors import UserError
from recipes.load import Section
from shards import arrays
from shards.seeds import generator


class WordTableConfig(Section):
    """Where the vectors come from."""

    # "clip": each word alone through the text tower of a CLIP file; "npy": an array of vectors and a list of words;
    # "random": fixed normal vectors; "trainable": learned, from small random ones
    kind: Literal["clip", "npy", "random", "trainable"] = "random"
    dim: int = Field(512, ge=1, le=WIDEST)  # of random and trainable vectors
    file: Path | None = None  # clip: the checkpoint; npy: float [W, D], or [W + 1, D] with the padding first
    words: Path | None = None  # npy: W words, one a line. clip: words beside those of the captions, one a line
    merges: Path | None = None  # clip: its list of byte pairs, bpe_simple_vocab_16e6.txt.gz
    seed: int = Field(0, ge=0)  # of random and trainable vectors

    @model_validator(mode="after")
    def _files(self) -> "WordTableConfig":
        wanted = {"clip": ("file", "merges"), "npy": ("file", "words")}.get(self.kind, ())
        missing = [name for name in wanted if getattr(self, name) is None]
        if missing:
            raise ValueError(f"kind = {self.kind} needs {' and '.join(missing)}")
        return self


class Vectors(NamedTuple):
    """Words and their vectors."""

    words: tuple[str, ...]  # each once, as `split_words` gives them
    rows: np.ndarray  # float32 [W, D]


def read_words(path: Path) -> list[str]:
    """The lines of a list of words, in lower case. UserError where it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a list of words, one a line, in UTF-8 ({error})") from error
    if not 0 < len(lines) <= MOST_WORDS or max(map(len, lines)) > LONGEST_WORD:
        raise UserError(f"{path} is no list of 1 to {MOST_WORDS:,} words, one a line")
    return [line.strip().casefold() for line in lines]


def read_vectors(file: Path, words: Path) -> Vectors:
    """A table made elsewhere. Of a word that is listed twice the first vector counts; what `split_words` never gives,
    such as punctuation, is left out."""
    names = read_words(words)
    try:
        with file.open("rb") as opened:
            header = arrays.check_size(opened)
            if header.dtype.hasobject or header.dtype.kind != "f":
                raise ValueError(f"it holds {header.dtype}, not floats")
            opened.seek(0)
            rows = np.load(opened, allow_pickle=False).astype(np.float32)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as an array of word vectors ({error})") from error
    if rows.ndim != 2 or len(rows) - len(names) not in (0, 1) or not np.isfinite(rows).all():
        raise UserError(
            f"{file} has the shape {rows.shape} where {len(names)} words of {words} want finite numbers "
            f"[{len(names)}, D], or [{len(names) + 1}, D] with the vector of the padding first"
        )
    rows = rows[len(rows) - len(names) :]
    first = {name: place for place, name in reversed(list(enumerate(names))) if split_words(name) == [name]}
    kept = sorted(first.values())
    if not kept:
        raise UserError(f"{words} has no line that is a word")
    return Vectors(tuple(names[place] for place in kept), rows[kept])


def random_vectors(words: Sequence[str], dim: int, seed: int) -> np.ndarray:
    """Normal numbers of variance 1, float32 [W, D]: a word has the same ones whatever other words there are."""
    rows = np.empty((len(words), dim), np.float32)
    for row, word in enumerate(words):
        counters = np.frombuffer(hashlib.sha256(word.encode()).digest()[:24], "<u8")
        rows[row] = generator(seed, "finetune/word_table", *counters.tolist()).standard_normal(dim, dtype=np.float32)
    return rows


def find(config: WordTableConfig, captions: Callable[[], tuple[str, ...]]) -> Vectors:
    """Words and vectors as the config says. captions: the words of the training captions, called where they are
    needed; "npy" has the words of its own list, so that all of them can be searched with."""
    if config.kind == "npy":
        return read_vectors(config.file, config.words)
    words = captions()
    if config.kind == "clip":
        more = read_words(config.words) if config.words else []
        words = tuple(sorted({*words, *(word for line in more for word in split_words(line))}))
        return Vectors(words, clip_text.word_vectors(config.file, config.merges, words))
    rows = random_vectors(words, config.dim, config.seed)
    return Vectors(words, rows if config.kind == "random" else rows * np.float32(config.dim**-0.5))


class WordTable(nn.Module):
    """Word numbers -> vectors. The table is part of the stored weights; that of the padding is 0.

    given: words with their vectors, or, for a stored model whose weights are loaded afterwards, its lexicon.
    """

    def __init__(self, config: WordTableConfig, given: Vectors | Lexicon):
        super().__init__()
        self.words = given.words
        if isinstance(given, Vectors):
            rows = torch.from_numpy(given.rows)
            rows = torch.cat([rows.new_zeros(1, rows.shape[1]), rows])
        else:
            rows = torch.zeros(len(given.words) + 1, given.dim)
        self.dim = rows.shape[1]
        self.vectors = nn.Parameter(rows, requires_grad=config.kind == "trainable")  # float32 [W + 1, D]

    @property
    def lexicon(self) -> Lexicon:
        """To be stored with the model."""
        return Lexicon(words=self.words, dim=self.dim)

    def forward(self, numbers: Tensor) -> Tensor:
        """numbers: int64 [B, L]. Returns float32 [B, L, D]; the vector of the padding gets no gradient and stays 0."""
        return F.embedding(numbers, self.vectors, padding_idx=PADDING)
