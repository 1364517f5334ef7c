"""The token cache: the same ids with and without it, a miss whenever anything that they depend on is another."""

import random

import numpy as np
import pytest
from damage import damaged
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from increlora.glue import token_cache

TEXTS = [("a b", "c"), ("b", "c c a"), ("", "b")]


def word_tokenizer(words: str, second_segment: int = 1) -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[SEP]", "[UNK]", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="$A [SEP]", pair=f"$A [SEP] $B:{second_segment} [SEP]:{second_segment}", special_tokens=[("[SEP]", 1)]
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", model_input_names=names
    )


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """A cache of its own, for any number of examples; what was computed is counted."""
    monkeypatch.setenv("INCRELORA_CACHE", str(tmp_path))
    monkeypatch.setattr(token_cache, "FROM", 1)
    return []


def encode(calls, texts=TEXTS, tokenizer=None, max_length=4):
    tokenizer = tokenizer or word_tokenizer("abc")

    def compute():
        calls.append(max_length)
        encoded = tokenizer(*map(list, zip(*texts, strict=True)), truncation=True, max_length=max_length)
        return encoded["input_ids"], encoded["token_type_ids"]

    return token_cache.encoded(texts, tokenizer, max_length, compute)


BY_HAND = ([[3, 1, 5, 1], [4, 1, 5, 1], [1, 4, 1]], [[0, 0, 1, 1], [0, 0, 1, 1], [0, 1, 1]])


def test_the_second_time_nothing_is_computed_and_all_is_the_same(calls):
    first, second = encode(calls), encode(calls)
    assert first == second == BY_HAND and len(calls) == 1
    assert all(type(value) is int for value in second[0][0])


@pytest.mark.parametrize(
    "other",
    [
        {"texts": [("a b", "c"), ("b", "c c a"), ("", "a")]},
        {"texts": [("a", "b c"), ("b", "c c a"), ("", "b")]},
        {"texts": [("a b",), ("c",)]},
        {"max_length": 5},
        {"tokenizer": word_tokenizer("acb")},
        {"tokenizer": word_tokenizer("abc", second_segment=0)},
    ],
    ids=["text", "boundary", "fields", "length", "vocabulary", "template"],
)
def test_another_input_is_a_miss(calls, other):
    encode(calls)
    encode(calls, **other)
    assert len(calls) == 2


def test_what_a_tokenizer_was_asked_before_does_not_matter(calls):
    tokenizer = word_tokenizer("abc")
    encode(calls, tokenizer=tokenizer)
    tokenizer("a b c", truncation=True, max_length=3, padding="max_length")
    encode(calls, tokenizer=tokenizer)
    assert len(calls) == 1
    assert tokenizer("a b c a", truncation=True, max_length=3)["input_ids"] == [3, 4, 1]  # nothing is left switched off


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 half a file", None], ids=["empty", "half", "missing array"])
def test_a_damaged_file_is_computed_again_and_mended(calls, tmp_path, damage):
    encode(calls)
    (path,) = tmp_path.rglob("*.npz")
    if damage is None:
        np.savez(path, lengths=np.array([1]))
    else:
        path.write_bytes(damage)
    assert encode(calls) == encode(calls) == BY_HAND
    assert len(calls) == 2


def test_a_place_that_cannot_be_written_changes_nothing(calls, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("INCRELORA_CACHE", str(tmp_path / "file"))
    assert encode(calls) == encode(calls) == BY_HAND and len(calls) == 2


def test_small_splits_and_slow_tokenizers_are_not_cached(calls, tmp_path, monkeypatch):
    class Slow:
        is_fast = False

    assert token_cache.encoded(TEXTS, Slow(), 4, lambda: ([[1]], None)) == ([[1]], None)
    monkeypatch.setattr(token_cache, "FROM", 4)
    encode(calls), encode(calls)
    assert len(calls) == 2 and not list(tmp_path.rglob("*.npz"))


def test_a_damaged_file_gives_no_other_ids(calls):
    encode(calls)
    (path,) = token_cache.folder().iterdir()
    whole, draw = path.read_bytes(), random.Random(0)
    for number in range(200):
        path.write_bytes(damaged(whole, number, draw))
        assert encode(calls) == BY_HAND, number
    assert len(calls) > 100  # nearly all damage was seen; the rest is where the zip keeps nothing
