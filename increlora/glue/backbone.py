"""The pretrained encoder with its freshly drawn classification head, and its tokenizer."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from increlora.errors import UserError, first_line
from increlora.glue.digest import require_published, sha256
from increlora.glue.model_files import CONFIG, OPTIONAL, WEIGHTS, ModelFiles, quiet, readable
from increlora.glue.tokenizing import load_tokenizer, word_tokenizer
from increlora.streams import derive_seed, stream
from increlora.validation import check_numbers, check_patterns

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

INITIALIZER_RANGE = 0.02  # BERT's, for models whose configuration names none


@dataclass
class Backbone:
    """One encoder; the fields are the keys of `configs/backbone/<name>.yaml`.

    Args:
        name: the backbone's name in results and tables.
        hub: repository on the Hugging Face hub; None if it is nowhere published.
        kinds: kind of matrix (query, key, value, attention_output, intermediate, output, or as the model has
            them) -> regular expression over whole module names.
        head: regular expression over whole parameter names: pooler and classifier, the trained head. It has to
            match whatever the pretrained weights do not bring.
        head_dropout_keys: entries of the configuration that carry the head's dropout; where the encoder's shares
            the entry, the name of the head's dropout module instead.
        architecture: arguments of the transformers configuration, `model_type` among them, that
            `weights="random"` builds from; a config.json in the given folder overrides it.
        tokenizer_files: what a folder must hold of the tokenizer: a list of alternatives, each a list of files.
        sentencepiece: one of these files, if the tokenizer is built from this SentencePiece model; None leaves it to
            transformers' class for the `model_type`.
        path: local folder with config.json, weights and tokenizer, instead of package and hub.
        weights: "pretrained" or "random".
        package: installed Python packages that ship the same files and are asked before the hub: `module` and
            `folder` within it, or `pieces` of a zip, `folder` and `files` within it; and the `requirement` that pip
            installs them by.
        sha256: digest of model.safetensors, checked before use unless `path` is given.
        revision: branch, tag or commit on the hub; None is its main branch.
        seed: seed of the head (and of the encoder, if random).
        max_length: longest input in tokens, special tokens included.

    Raises:
        UserError: `weights` is neither of the two, or the architecture names no `model_type`.
    """

    name: str
    hub: str | None
    kinds: dict[str, str]
    head: str
    head_dropout_keys: list[str]
    architecture: dict[str, Any]
    tokenizer_files: list[list[str]]
    sentencepiece: str | None = None
    path: str | None = None
    weights: str = "pretrained"
    package: dict[str, Any] | None = None
    sha256: str | None = None
    revision: str | None = None
    seed: int = 0
    max_length: int = 512

    def __post_init__(self) -> None:
        self.drawn: list[str] = []  # the parameters that `model` drew at random, by name
        check_numbers(self)
        check_patterns({"head": self.head, **{f"kinds.{kind}": pattern for kind, pattern in self.kinds.items()}})
        if self.weights not in ("pretrained", "random"):
            raise UserError(f"backbone.weights={self.weights}: it can be pretrained or random")
        if not self.model_type:
            raise UserError("backbone.architecture has no model_type: give it as config.json has it, e.g. bert")

    @property
    def files(self) -> ModelFiles:
        """Where the weights and the tokenizer are."""
        return ModelFiles(self.name, self.hub, self.revision, self.package, self.path, self.sha256)

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
            UserError: no such folder or files, no hub, weights of something else, or a `head` or
                `head_dropout_keys` that leave a part of the head out.
        """
        if self.weights == "random":
            config = self._config(self.files.described(), num_labels, head_dropout)
            model = self._random_model(config)
            absent = {name for name, _ in model.named_parameters() if re.fullmatch(self.head, name)}
        else:
            folder = self.files.folder(CONFIG, WEIGHTS)
            if self.sha256 is not None and self.path is None:
                require_published(folder / "model.safetensors", self.sha256)
            model, absent = self._load(folder, self._config(folder, num_labels, head_dropout))
        self._set_head_dropout(model, head_dropout)
        self._draw_head(model, absent)
        return _in_fp32(model)

    def refuse_frozen_head(self, model: nn.Module) -> None:
        """Refuse a model whose method leaves a part of the head at the random values that `model` drew.

        Raises:
            UserError: it does.
        """
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        frozen = [name for name in self.drawn if name not in trained]
        if frozen:
            raise UserError(
                f"method.head does not match {', '.join(frozen)}, and no pretrained weights bring it:\n"
                "at random values, it would be neither trained nor saved; leave method.head as it is"
            )

    def inputs(self) -> dict[str, str]:
        """Digests (sha256) of the files that decide what the encoder is, by name: its weights, or its config.json.

        Of a folder that the user gave also those of its config.json and its tokenizer.

        Nothing where these fields decide alone. Where the weights are still to be fetched, as they never are after
        `model`, that they are not from a folder.

        Raises:
            UserError: no such folder, or files that cannot be read.
        """
        if self.weights == "random":
            folder = self.files.described()
            return {} if folder is None else {"base": sha256(folder / CONFIG[0][0])}
        if self.sha256 is not None and self.path is None:
            return {"base": self.sha256}  # `model` refuses any other
        folder = self.files.present(CONFIG, WEIGHTS)
        if folder is None:
            return {"folder": "none"}
        found = {"base": sha256(next(folder / name for (name,) in WEIGHTS if (folder / name).is_file()))}
        if self.path is None:  # the hub's revision and a package's version say the rest
            return found
        names = {name for files in self.tokenizer_files for name in files} | {*OPTIONAL}
        there = sorted(name for name in names if (folder / name).is_file())
        words = "".join(f"{name} {sha256(folder / name)}\n" for name in there)
        described = sha256(folder / CONFIG[0][0])
        return found | {"architecture": described, "tokenizer": hashlib.sha256(words.encode()).hexdigest()}

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The backbone's tokenizer; one built from the synthetic task's words if it has no files anywhere.

        Raises:
            UserError: no such folder or files, or no hub.
        """
        if self.hub is None and self.package is None and self.path is None:
            tokenizer = word_tokenizer()
            self._check_vocabulary(len(tokenizer))
        else:
            folder = self.files.folder(self.tokenizer_files)
            with quiet(), readable(folder, "tokenizer"):
                tokenizer = load_tokenizer(folder, self.model_type, self.sentencepiece)
        tokenizer.model_max_length = self.max_length
        return tokenizer

    # configuration and weights

    def _config(self, folder: Path | None, num_labels: int, head_dropout: float) -> "PreTrainedConfig":
        from transformers import AutoConfig

        if folder is None:
            with self._buildable():
                config = AutoConfig.for_model(**self.architecture)
        else:
            with quiet(), readable(folder, "config.json"):
                config = AutoConfig.from_pretrained(folder)
            if config.model_type != self.model_type:
                raise UserError(
                    f"{folder} holds a {config.model_type} model; backbone {self.name} needs {self.model_type}"
                )
        config.num_labels = num_labels
        for key in self.head_dropout_keys:
            if key.isidentifier():  # the name of a module has a dot
                setattr(config, key, head_dropout)
        return config

    def _random_model(self, config: "PreTrainedConfig") -> "PreTrainedModel":
        from transformers import AutoModelForSequenceClassification

        with self._buildable(), self._own_randomness():
            return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)

    @contextmanager
    def _buildable(self) -> Iterator[None]:
        """Turn what transformers raises over `architecture` into a UserError."""
        try:
            yield
        # an unknown model type, one without a classifier, a value of the wrong type or size: no common class
        except Exception as error:
            said = first_line(error).partition(" Should contain")[0]
            raise UserError(f"backbone.architecture (model_type={self.model_type}) cannot be built: {said}") from error

    def _load(self, folder: Path, config: "PreTrainedConfig") -> tuple["PreTrainedModel", set[str]]:
        """The model with the folder's weights, and the names of the parameters that these lack, the encoder's apart."""
        from transformers import AutoModelForSequenceClassification

        with quiet(), readable(folder, "weights"), self._own_randomness():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                folder, config=config, dtype=torch.float32, local_files_only=True, output_loading_info=True,
                ignore_mismatched_sizes=True,  # a classifier for other labels; anything else is refused below
            )  # fmt: skip
        absent = info["missing_keys"] | {mismatch[0] for mismatch in info["mismatched_keys"]}
        encoder = f"{model.base_model_prefix}."
        lost = sorted(name for name in absent if name.startswith(encoder) and not re.fullmatch(self.head, name))
        spare = _further_layers(model, info["unexpected_keys"])
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

    # the head

    def _set_head_dropout(self, model: "PreTrainedModel", probability: float) -> None:
        modules = dict(model.named_modules())
        for key in set(self.head_dropout_keys) & set(modules):
            modules[key].p = probability
        beside = [module.p for module in modules.values() if isinstance(module, nn.Dropout)]
        inside = [module.p for module in model.base_model.modules() if isinstance(module, nn.Dropout)]
        of_head = Counter(beside) - Counter(inside)
        if probability not in of_head and (of_head or probability > 0):
            raise UserError(
                f"backbone.head_dropout_keys={self.head_dropout_keys} do not reach the head's dropout: it stays at "
                f"{', '.join(map(str, of_head)) or 'none'} and should be {probability:g} (task.head_dropout)"
            )

    @torch.no_grad()
    def _draw_head(self, model: "PreTrainedModel", absent: set[str]) -> None:
        """Draw the classifier and `absent`: matrices from N(0, initializer_range^2), scales 1, biases 0."""
        self.drawn = drawn = sorted(_classifier(model) | absent)
        loose = [name for name in drawn if not re.fullmatch(self.head, name)]
        if loose:
            raise UserError(
                f"backbone.head={self.head!r} does not match {', '.join(loose)},\n"
                "which no pretrained weights bring: drawn at random, it would be neither trained nor saved"
            )
        for name in drawn:
            parameter = model.get_parameter(name)
            values = torch.zeros(parameter.shape, device="cpu")
            if parameter.ndim > 1:
                deviation = getattr(model.config, "initializer_range", INITIALIZER_RANGE)
                values.normal_(0.0, deviation, generator=stream(self.seed, "head", name))
            elif name.endswith(".weight"):  # of a normalization
                values.fill_(1.0)
            parameter.copy_(values)

    def _check_vocabulary(self, tokens: int) -> None:
        if tokens > self.architecture["vocab_size"]:
            raise UserError(
                f"backbone.architecture.vocab_size={self.architecture['vocab_size']} is below "
                f"the {tokens} tokens of the built-in tokenizer"
            )


def _classifier(model: "PreTrainedModel") -> set[str]:
    """The parameters that give the logits: those of the last part beside the encoder that has any."""
    own = [name for name, _ in model.named_parameters() if not name.startswith(f"{model.base_model_prefix}.")]
    last = own[-1].partition(".")[0]
    return {name for name in own if name.partition(".")[0] == last}


def _further_layers(model: "PreTrainedModel", spare: Iterable[str]) -> list[str]:
    """The names that differ from those of the model by the number of a layer alone."""
    known = {_without_numbers(name) for name in model.state_dict()}
    prefix = model.base_model_prefix  # which the file of an encoder alone leaves out
    return sorted(name for name in spare if known & {_without_numbers(name), _without_numbers(f"{prefix}.{name}")})


def _without_numbers(name: str) -> str:
    return re.sub(r"\b\d+\b", "N", name)


def _in_fp32(model: "PreTrainedModel") -> "PreTrainedModel":
    other = {p.dtype for p in model.parameters()} - {torch.float32}
    assert not other, f"parameters in {other}"
    return model
