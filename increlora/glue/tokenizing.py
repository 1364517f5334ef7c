"""Tokenizers as the backbones were trained with: from their own files, or whole words of the synthetic task."""

import string
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL_TOKENS = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}


def load_tokenizer(folder: Path, model_type: str, sentencepiece: str | None) -> "PreTrainedTokenizerBase":
    """The tokenizer of a folder, with no limit on the length.

    Args:
        model_type: whose tokenizer class of transformers builds it.
        sentencepiece: file of a SentencePiece model that is read instead, or, where it is absent, tokenizer.json as
            it stands; None leaves it to the class.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if sentencepiece is None:
        tokenizer = AutoTokenizer.from_pretrained(folder, tokenizer_type=model_type)
    elif (folder / sentencepiece).is_file():
        tokenizer = sentencepiece_tokenizer(folder / sentencepiece)
    else:  # the class would rebuild it without the normalization
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    # a file may bring its author's limits (MiniLM's cuts at 128 and pads to it); the caller sets them
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def sentencepiece_tokenizer(file: Path) -> "PreTrainedTokenizerBase":
    """DeBERTaV3's tokenizer, with the ids that SentencePiece itself gives.

    transformers 5 builds its own without the model's character normalization and byte pieces, and so
    turns what needs them (½, µ, ligatures, full-width letters) into [UNK].

    Args:
        file: a SentencePiece unigram model with [PAD], [CLS], [SEP], [UNK] as pieces 0 to 3.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    proto = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    backend = Tokenizer(models.Unigram(pieces, proto.trainer_spec.unk_id, proto.trainer_spec.byte_fallback))
    backend.normalizer = normalizers.Sequence([
        normalizers.NFC(),  # Precompiled misses some decomposed letters that SentencePiece composes
        normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap),
        normalizers.Replace(Regex(" {2,}"), " "),
        normalizers.Strip(),
    ])  # fmt: skip
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(replacement="▁")])
    return _with_special_tokens(backend, mask_token="[MASK]")


def word_tokenizer() -> "PreTrainedTokenizerBase":
    """Whole words of the synthetic task, anything else character by character, in lower case; needs no files."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    from increlora.glue.synthetic import VOCABULARY

    characters = sorted(set(string.printable.lower()) - set(string.whitespace))
    words = sorted({word.lower() for word in VOCABULARY})
    tokens = [*SPECIAL_TOKENS.values(), *characters, *(f"##{c}" for c in characters), *words]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return _with_special_tokens(backend)


def _with_special_tokens(backend: Any, **more: str) -> "PreTrainedTokenizerBase":
    """[CLS] a [SEP] b [SEP], with b's tokens of type 1."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    known = [(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0", pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", special_tokens=known
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL_TOKENS, **more)
