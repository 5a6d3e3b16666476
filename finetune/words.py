"""Sentences to numbers of words, and back to the words that a model does not know.

A word is a run of letters and digits, in lower case; hyphens and punctuation separate words. Number 0 is the padding,
the words of a vocabulary are 1, 2, ... A word that the vocabulary has not is left out of its sentence and named to who
wrote it: no vector says anything about it.
"""

import difflib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import Field, field_validator

from recipes.errors import UserError
from recipes.load import Section

PADDING = 0
WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
MOST_WORDS, LONGEST_WORD, WIDEST = 1 << 20, 200, 1 << 16  # what the file of a model may claim


class WordsConfig(Section):
    """What is read of a sentence."""

    longest: int = Field(105, ge=1, le=1024)  # words read; the published code has 105, what comes behind is cut off
    min_count: int = Field(1, ge=1)  # a word that the training captions have less often is unknown


def split_words(text: str) -> list[str]:
    """The words of a text in their order: "A lady's T-shirt." -> a, lady's, t, shirt."""
    return WORD.findall(unicodedata.normalize("NFKC", text).replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").casefold())


class Lexicon(Section):
    """What a stored model tells about its words, so that it reads sentences without the files of its training."""

    words: tuple[Annotated[str, Field(min_length=1, max_length=LONGEST_WORD)], ...] = Field(max_length=MOST_WORDS)
    dim: int = Field(ge=1, le=WIDEST)  # length of the vector of a word

    @field_validator("words")
    @classmethod
    def _once(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        if not words or len(set(words)) < len(words):
            raise ValueError("there must be words, each once")
        return words


class Encoded(NamedTuple):
    """A sentence in numbers."""

    numbers: list[int]  # of the known words, in their order, at most `longest`
    unknown: tuple[str, ...]  # the others, each once, in their order


class Vocabulary:
    """Words and their numbers. words: each once, as `split_words` gives them."""

    def __init__(self, words: Sequence[str]):
        assert len(set(words)) == len(words), "a word has one number"
        self.words = tuple(words)
        self.numbers = {word: number for number, word in enumerate(self.words, start=1)}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str, longest: int) -> Encoded:
        """The first `longest` known words of a text, and what is unknown."""
        words = split_words(text)
        known = [self.numbers[word] for word in words if word in self.numbers]
        return Encoded(known[:longest], tuple(dict.fromkeys(word for word in words if word not in self.numbers)))

    def unknown_sentence(self, unknown: Sequence[str]) -> str:
        """For the terminal: the unknown words, each with the known word that is spelled most alike."""
        told = []
        for word in unknown:
            near = difflib.get_close_matches(word, self.words, n=1)
            told.append(f"{word!r} (known is {near[0]!r})" if near else repr(word))
        return f"unknown to this model and left out: {', '.join(told)}"

    def rows(self, texts: Sequence[str], longest: int) -> tuple[np.ndarray, tuple[str, ...]]:
        """Sentences of a user -> word numbers int64 [S, L], padded at the end, and the unknown words of all.

        UserError naming the sentence that has no known word: nothing can be searched with it.
        """
        found = [self.encode(text, longest) for text in texts]
        for text, encoded in zip(texts, found, strict=True):
            if not encoded.numbers:
                why = self.unknown_sentence(encoded.unknown) if encoded.unknown else "it has no letters or digits"
                raise UserError(f"{text[:80]!r} has no word that this model knows ({why}); say it otherwise")
        unknown = dict.fromkeys(word for encoded in found for word in encoded.unknown)
        return padded([encoded.numbers for encoded in found]), tuple(unknown)


def padded(numbers: Sequence[Sequence[int]]) -> np.ndarray:
    """Lists of word numbers -> int64 [S, L], L the longest, at least 1; 0 behind the end of a sentence."""
    found = np.full((len(numbers), max([1, *map(len, numbers)])), PADDING, np.int64)
    for row, own in enumerate(numbers):
        found[row, : len(own)] = own
    return found


def frequent_words(captions: Iterable[Sequence[str]], min_count: int) -> tuple[str, ...]:
    """The words that the captions have at least `min_count` times, in the order of the alphabet.

    captions: the sentences of each image. UserError where nothing is left.
    """
    counts = Counter(word for texts in captions for text in texts for word in split_words(text))
    words = tuple(sorted(word for word, count in counts.items() if count >= min_count))
    if not words:
        raise UserError(
            f"the training images have no captions with a word that comes method.words.min_count = {min_count} times; "
            "text search learns from sentences: pack a set that has them"
        )
    return words


class Sentences(NamedTuple):
    """The captions of a training set in numbers. S sentences, several of them may be of one image."""

    numbers: np.ndarray  # int64 [S, L], padded at the end
    owners: np.ndarray  # int64 [S], ascending: the image of each, its place in the list of captions
    left_out: int  # sentences without any known word
    unknown: tuple[str, ...]  # words that are left out of all sentences, the most frequent first


def encode_captions(vocabulary: Vocabulary, captions: Sequence[Sequence[str]], longest: int) -> Sentences:
    """All captions of all images. captions: the sentences of each image, () where it has none.

    UserError where no sentence has a known word.
    """
    numbers, owners, left_out, unknown = [], [], 0, Counter[str]()
    for place, texts in enumerate(captions):
        for text in texts:
            encoded = vocabulary.encode(text, longest)
            unknown.update(encoded.unknown)
            if encoded.numbers:
                numbers.append(encoded.numbers)
                owners.append(place)
            else:
                left_out += 1
    if not numbers:
        raise UserError(
            f"none of the {left_out} training captions has a word of the {len(vocabulary)} in the word table"
        )
    often = tuple(word for word, _ in sorted(unknown.items(), key=lambda item: (-item[1], item[0])))
    return Sentences(padded(numbers), np.array(owners, np.int64), left_out, often)
