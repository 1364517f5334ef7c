"""Golden token ids of DeBERTaV3: what the backbone gives, against `sentencepiece` itself and stored numbers.

`data_tokens.json` holds ten pairs of texts with the ids [CLS] first [SEP] second [SEP] that the
`sentencepiece` library gives for them (0.2.3, `spm.model` of sha256 c679fbf9...). `stock` marks the pairs
on which DebertaV2Tokenizer of transformers 5 agrees: it has neither the model's nmt_nfkc normalisation
(its normalizer is NFC) nor its byte pieces, so that ½, no-break spaces, full-width letters, emoji and
control characters come out as [UNK].
"""

import hashlib
import json

import pytest
from conftest import HELPERS, SHARED
from naming import naming

CLS, SEP = 1, 2
PAIRS = json.loads((HELPERS / "data_tokens.json").read_text())


@pytest.fixture(scope="module")
def model():
    file = SHARED / "deberta-v3-tokenizer" / "spm.model"
    if not file.is_file():
        pytest.skip(f"no DeBERTaV3 tokenizer at {file} (set INCRELORA_SHARED)")
    return file


@pytest.fixture(scope="module")
def tokenizer(model):
    from increlora.glue.tokenizing import sentencepiece_tokenizer

    return sentencepiece_tokenizer(model)


@pytest.fixture(scope="module")
def sentencepiece(model):
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(model))


@pytest.fixture(scope="module")
def stock(model):
    from transformers import DebertaV2Tokenizer

    return DebertaV2Tokenizer.from_pretrained(model.parent)


def test_it_is_the_model_of_deberta_v3(model):
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    assert digest == "c679fbf93643d19aab7ee10c0b99e460bdbc02fedf34b92b05af343b4af586fd"


def test_ten_pairs_of_several_kinds():
    assert len(PAIRS) == 10
    assert 0 < sum(pair["stock"] for pair in PAIRS) < 10
    assert all(pair["ids"][0] == CLS and pair["ids"].count(SEP) == 2 and pair["ids"][-1] == SEP for pair in PAIRS)


def test_sentencepiece_gives_the_golden_ids(sentencepiece):
    for pair in PAIRS:
        with naming(pair):
            first, second = sentencepiece.encode([pair["first"], pair["second"]])
            assert [CLS, *first, SEP, *second, SEP] == pair["ids"]


def test_the_backbone_gives_the_golden_ids(tokenizer):
    for pair in PAIRS:
        with naming(pair):
            encoded = tokenizer([pair["first"]], [pair["second"]], truncation=True, max_length=320)
            assert encoded["input_ids"] == [pair["ids"]]


def test_transformers_agrees_on_ordinary_text(stock):
    for pair in [pair for pair in PAIRS if pair["stock"]]:
        with naming(pair):
            assert stock(pair["first"], pair["second"])["input_ids"] == pair["ids"]


def test_every_text_of_real_tasks_has_the_ids_of_sentencepiece(tokenizer, sentencepiece, shared):
    lines = [
        line.split("\t")
        for file in ("CoLA/train.tsv", "RTE/train.tsv", "MRPC/train.tsv", "STS-B/train.tsv")
        for line in (shared / "glue" / file).read_text(encoding="utf-8").split("\n")
    ]
    texts = [max(fields, key=len) for fields in lines]
    expected = sentencepiece.encode(texts)
    found = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert [text for text, a, b in zip(texts, found, expected, strict=True) if a != b] == []


def test_mask_and_padding(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id) == (0, CLS, SEP)
    assert tokenizer.convert_tokens_to_ids("[MASK]") == 128000
