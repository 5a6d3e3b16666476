"""Words of sentences, vocabularies, what is unknown, and the tables of vectors."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from finetune import clip_text, word_table
from finetune.word_table import Vectors, WordTable, WordTableConfig, find, random_vectors, read_vectors
from finetune.words import Lexicon, Vocabulary, encode_captions, frequent_words, split_words
from recipes.errors import UserError

WORDS = ("a", "bag", "coat", "in", "red", "woman")


def test_words_by_hand():
    assert split_words("A lady's T-shirt, 2 BAGS.") == ["a", "lady's", "t", "shirt", "2", "bags"]
    assert split_words("the man\u2019s  black/white_shoes") == ["the", "man's", "black", "white", "shoes"]
    assert split_words("Ｃｏａｔ… STRASSE straße") == ["coat", "strasse", "strasse"], "full width and sharp s"
    assert split_words("... !") == []


def test_numbers_and_padding_by_hand():
    vocabulary = Vocabulary(WORDS)
    numbers, unknown = vocabulary.rows(["A woman in red", "a green coat, a green bag"], longest=10)
    assert numbers.tolist() == [[1, 6, 4, 5], [1, 3, 1, 2]]
    assert unknown == ("green",)
    assert vocabulary.rows(["red", "a red bag"], longest=10)[0].tolist() == [[5, 0, 0], [1, 5, 2]]
    assert vocabulary.rows(["a red bag"], longest=2)[0].tolist() == [[1, 5]], "what is too long is cut"
    assert vocabulary.rows(["green red green bag"], longest=2)[0].tolist() == [[5, 2]], "unknown words take no place"


def test_unknown_words_are_named_with_what_is_near():
    told = Vocabulary(WORDS).unknown_sentence(("coats", "xylophone"))
    assert told == "unknown to this model and left out: 'coats' (known is 'coat'), 'xylophone'"


@pytest.mark.parametrize(
    ("text", "message"),
    [("green trousers", "no word that this model knows .*'green'.*'trousers'"), ("?!", "no letters or digits")],
)
def test_a_sentence_without_a_known_word_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        Vocabulary(WORDS).rows(["a woman", text], longest=9)


def test_frequent_words_count_over_all_captions():
    captions = [("A red coat.", "red coat"), (), ("a blue coat",)]
    assert frequent_words(captions, 1) == ("a", "blue", "coat", "red")
    assert frequent_words(captions, 2) == ("a", "coat", "red")
    assert frequent_words(captions, 3) == ("coat",)
    with pytest.raises(UserError, match="min_count = 4"):
        frequent_words(captions, 4)


def test_captions_of_a_set():
    found = encode_captions(Vocabulary(WORDS), [("a red coat", "blue"), (), ("blue bag", "blue green coat")], 5)
    assert found.numbers.tolist() == [[1, 5, 3], [2, 0, 0], [3, 0, 0]]
    assert found.owners.tolist() == [0, 2, 2]
    assert found.left_out == 1
    assert found.unknown == ("blue", "green"), "the most frequent first"
    with pytest.raises(UserError, match="none of the 1 training captions"):
        encode_captions(Vocabulary(WORDS), [("grey",)], 5)


@pytest.mark.parametrize("words", [(), ("a", "a"), ("",), ("x" * 201,)], ids=["none", "twice", "empty", "long"])
def test_a_stored_lexicon_is_checked(words):
    with pytest.raises(ValidationError):
        Lexicon(words=words, dim=3)


def test_random_vectors_belong_to_the_word_and_the_seed():
    ours = random_vectors(WORDS, 2000, seed=1)
    assert ours.mean() == pytest.approx(0, abs=0.03)
    assert ours.std() == pytest.approx(1, abs=0.03)
    others = random_vectors(("zebra", *reversed(WORDS)), 2000, seed=1)
    np.testing.assert_array_equal(others[1:][::-1], ours)
    assert np.abs(random_vectors(WORDS, 2000, seed=2) - ours).mean() > 0.5
    assert np.abs(np.corrcoef(ours) - np.eye(len(WORDS))).max() < 0.15


def config(kind: str, **more) -> WordTableConfig:
    return WordTableConfig(kind=kind, **more)


def captions() -> tuple[str, ...]:
    return WORDS


@pytest.mark.parametrize("kind", ["random", "trainable"])
def test_only_a_trainable_table_gets_a_gradient_and_padding_stays_zero(kind):
    table = WordTable(config(kind, dim=5), find(config(kind, dim=5), captions))
    numbers = torch.tensor([[1, 3, 0]])
    found = table(numbers)
    assert found.shape == (1, 3, 5)
    assert (found[0, 2] == 0).all()
    assert table.vectors.requires_grad == (kind == "trainable")
    if kind == "trainable":
        (found.sum() + 1).backward()
        moved = (table.vectors.grad != 0).any(dim=1)
        assert moved.tolist() == [False, True, False, True, False, False, False]


def test_a_stored_model_gets_its_table_from_its_weights():
    first = WordTable(config("random", dim=4), find(config("random", dim=4), captions))
    again = WordTable(config("npy", file="gone.npy", words="gone.txt"), first.lexicon)
    again.load_state_dict(first.state_dict())
    assert again.words == WORDS
    assert torch.equal(again(torch.tensor([[2, 6]])), first(torch.tensor([[2, 6]])))


@pytest.fixture
def stored(tmp_path):
    """Six vectors with their words, as others hand them out."""
    rows = np.arange(12, dtype=np.float16).reshape(6, 2)
    (tmp_path / "words.txt").write_text("Coat\n,\nbag\ncoat\nt-shirt\nred\n")
    np.save(tmp_path / "words.npy", rows)
    return tmp_path / "words.npy", tmp_path / "words.txt", rows


def test_a_table_from_a_file(stored):
    file, words, rows = stored
    found = read_vectors(file, words)
    assert found.words == ("coat", "bag", "red"), "the first of two; no punctuation, nothing with a hyphen"
    np.testing.assert_array_equal(found.rows, rows[[0, 2, 5]])
    np.save(file, np.concatenate([np.full((1, 2), 7, np.float32), rows]))
    again = read_vectors(file, words)
    assert again.words == found.words, "with the vector of the padding first"
    np.testing.assert_array_equal(again.rows, found.rows)
    table = find(config("npy", file=file, words=words), captions)
    assert table.words == found.words, "all of its words can be searched with, whatever the captions have"


def test_damaged_tables_are_refused_by_name(stored, tmp_path):
    file, words, rows = stored
    for wrong, message in (
        (rows[:4], r"shape \(4, 2\) where 6 words"),
        (rows.astype(np.int64), "not floats"),
        (np.full((6, 2), np.nan), "finite"),
    ):
        np.save(file, wrong)
        with pytest.raises(UserError, match=message):
            read_vectors(file, words)
    file.write_bytes(b"no array")
    with pytest.raises(UserError, match=r"words\.npy cannot be read"):
        read_vectors(file, words)
    with pytest.raises(UserError, match=r"gone\.txt cannot be read"):
        read_vectors(file, tmp_path / "gone.txt")
    with pytest.raises(ValidationError, match="kind = clip needs file and merges"):
        config("clip")


def test_the_words_of_a_clip_table_are_those_of_the_captions_and_a_list(tmp_path, monkeypatch):
    asked = {}

    def vectors(file, merges, words):
        asked["words"] = tuple(words)
        return np.zeros((len(words), 3), np.float32)

    monkeypatch.setattr(clip_text, "word_vectors", vectors)
    (tmp_path / "more.txt").write_text("umbrella\nred\nT-shirt\n")
    given = config("clip", file="c.pt", merges="m.gz", words=tmp_path / "more.txt")
    found = find(given, captions)
    assert isinstance(found, Vectors)
    assert found.words == asked["words"] == tuple(sorted({*WORDS, "umbrella", "t", "shirt"}))
    assert word_table.clip_text is clip_text
