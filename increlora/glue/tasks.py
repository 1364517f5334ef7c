"""What a task is: its texts and labels, from the hub or a folder of TSV files, its loss and its metrics.

The files of a folder are GLUE's own: `train.tsv` and `dev.tsv` (MNLI: `dev_matched.tsv`, `dev_mismatched.tsv`),
with a header line unless `columns` gives positions.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from increlora.errors import UserError
from increlora.files import given_path, shown
from increlora.glue import token_cache
from increlora.glue.tsv import read_tsv
from increlora.streams import stream
from increlora.validation import check_numbers

GLUE = "nyu-mll/glue"
GLUE_REVISION = "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"
CLASS_METRICS = ("accuracy", "f1", "matthews_correlation")
SCORE_METRICS = ("pearson", "spearmanr")
LARGEST = 3e38  # of a score: what float32, in which the loss is computed, can hold


@dataclass
class Examples:
    """One split before tokenisation: the texts of each example (one or two), and its class id or score.

    While data are read, labels are `Word`s: what a word means is decided by all of them.
    """

    texts: list[tuple[str, ...]]
    labels: list[Any]
    skipped: int = 0

    def select(self, indices: Sequence[int]) -> "Examples":
        """The examples at `indices`, in that order."""
        return Examples([self.texts[i] for i in indices], [self.labels[i] for i in indices], self.skipped)

    def joined(self, other: "Examples") -> "Examples":
        """These examples, then the others."""
        return Examples([*self.texts, *other.texts], [*self.labels, *other.labels], self.skipped + other.skipped)


class Word(NamedTuple):
    """A label as the data have it, and where."""

    text: str
    where: str


@dataclass
class Split:
    """One split, tokenised and not padded: a row of token ids and a class id or score per example."""

    name: str
    input_ids: list[list[int]]
    token_type_ids: list[list[int]] | None
    labels: list[int] | list[float]

    @property
    def lengths(self) -> list[int]:
        """Tokens of every example, special tokens included."""
        return [len(row) for row in self.input_ids]

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass
class TaskData:
    """The tokenised splits of a run, and where they come from.

    Args:
        evaluation: by name, in order; the first is the primary split. `holdout` and `dev+holdout` are there if asked
            for.
        source: `nyu-mll/glue@<revision>`, the folder, or `synthetic`.
        sizes: examples per split as used.
        fingerprint: sha256 over texts and labels of the source, before `train_fraction` and `holdout`,
            whatever the tokeniser and the seed; scores enter as float32, the hub's precision.
        truncated: examples per split that were cut at `max_length`.
        skipped: malformed rows per source split that were left out (only with `lenient`).
    """

    train: Split
    evaluation: dict[str, Split]
    source: str
    sizes: dict[str, int]
    fingerprint: str
    truncated: dict[str, int]
    skipped: dict[str, int] = field(default_factory=dict)


@dataclass
class Task:
    """One task; the fields are the keys of `configs/task/<name>.yaml`.

    Args:
        name: the task's name in results and tables.
        fields: one or two columns of text.
        labels: class names in order of their ids; None for regression.
        metrics: any of accuracy, f1, matthews_correlation (classes), pearson, spearmanr (scores).
        primary: the metric that selects a checkpoint, or several whose mean does.
        max_length: tokens per example, special tokens included; the longer text of a pair is cut first.
        subset: name of the subset on the hub (`nyu-mll/glue`); None if the task has only local data.
        dev: splits to evaluate on, primary first; `dev` is `validation` on the hub and `dev.tsv` locally.
        columns: TSV column of a field or of `label`, where it differs: a name, or a position from 0 if
            the train and dev files have no header.
        score_range: lowest and highest score allowed in regression; None allows any finite score.
        lenient: leave out rows with a wrong number of fields (they are counted) and keep empty texts, as
            the hub's QQP does; otherwise both are errors.
        head_dropout: dropout before the classifier (applied by the backbone).
        data_dir: folder of TSV files, or a folder that holds it as `folder`; None reads the hub.
        folder: name of the task's folder in the public GLUE archive.
        train_examples: published size of train, for planning (scripts/describe.py); a run counts the data itself.
        holdout: share of train held out as the split `holdout`.
        joint: score the first of `dev` and `holdout` as one split too, named `dev+holdout`: more examples, less noise.
        train_fraction: share of train used at all; drawn before `holdout`, smaller shares are subsets.
        seed: of the choice of `holdout` and `train_fraction`, of nothing else.

    Raises:
        UserError: settings that contradict each other or are out of range.
    """

    name: str
    fields: list[str]
    labels: list[str] | None
    metrics: list[str]
    primary: str | list[str]
    max_length: int
    subset: str | None = None
    dev: list[str] = field(default_factory=lambda: ["dev"])
    columns: dict[str, str | int] = field(default_factory=dict)
    score_range: list[float] | None = None
    lenient: bool = False
    head_dropout: float = 0.0
    data_dir: str | None = None
    folder: str | None = None
    train_examples: int | None = None
    holdout: float = 0.0
    train_fraction: float = 1.0
    seed: int = 0
    joint: bool = False
    fingerprint: str | None = field(default=None, init=False, repr=False, compare=False)  # of what was read

    def __post_init__(self) -> None:
        check_numbers(self)
        self.primary = [self.primary] if isinstance(self.primary, str) else list(self.primary)
        self._check_names()
        self._check_metrics()
        if not 0 <= self.holdout < 1:
            raise UserError(f"task.holdout={self.holdout}: a share of train, at least 0 and below 1")
        if self.joint and not self.holdout:
            raise UserError("task.joint=true scores dev and held-out examples as one split: set task.holdout, e.g. 0.1")
        if not 0 < self.train_fraction <= 1:
            raise UserError(f"task.train_fraction={self.train_fraction}: a share of train, above 0 and at most 1")

    @property
    def num_labels(self) -> int:
        """Outputs of the classifier; 1 for regression."""
        return 1 if self.labels is None else len(self.labels)

    # training and evaluation

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean loss in at least fp32: cross-entropy of (batch, classes) logits, squared error of (batch, 1) scores."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.labels is None:
            return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype))
        return F.cross_entropy(logits, labels)

    def predict(self, logits: Tensor) -> Tensor:
        """Class ids, or scores, of shape (batch,)."""
        return logits.float().squeeze(-1) if self.labels is None else logits.argmax(-1)

    def evaluate(self, predictions: Any, labels: Any) -> dict[str, float]:
        """Every metric of the task in natural units, and `score`: the mean of the primary ones.

        Args:
            predictions: what `predict` gave, for a whole split.
            labels: of the same length.
        """
        from increlora.glue.metrics import GlueMetric  # it imports `evaluate`, which takes seconds

        values = GlueMetric(self.metrics).compute(predictions=predictions, references=labels)
        return values | {"score": sum(values[name] for name in self.primary) / len(self.primary)}

    # data

    def load(self, tokenizer: Any) -> TaskData:
        """Read, choose and tokenise every split.

        Args:
            tokenizer: a tokenizer of transformers.

        Raises:
            UserError: data that is missing or malformed (with file and line), or a `max_length` that
                leaves no room for text.
        """
        self._check_length(tokenizer)
        source, splits = self.read()
        self.fingerprint = digest = fingerprint(splits)
        chosen = self._choose(splits)
        tokenised = {name: self.tokenise(name, examples, tokenizer) for name, examples in chosen.items()}
        truncated = {name: self._count_truncated(tokenised[name], chosen[name], tokenizer) for name in chosen}
        return TaskData(
            train=tokenised["train"],
            evaluation={name: split for name, split in tokenised.items() if name != "train"},
            source=source,
            sizes={name: len(split) for name, split in tokenised.items()},
            fingerprint=digest,
            truncated=truncated,
            skipped={name: examples.skipped for name, examples in splits.items() if examples.skipped},
        )

    def inputs(self) -> dict[str, str]:
        """The digest of the data, by name: of what `load` read, else of the local files.

        Before, data from the hub have their source, with its revision; of generated data the fields say what they are.

        Raises:
            UserError: local data that is missing or malformed.
        """
        if self.fingerprint is None and self.data_dir is not None:
            self.fingerprint = fingerprint(self.read()[1])
        if self.fingerprint is not None:
            return {"data": self.fingerprint}
        return {} if self.subset is None else {"source": f"{GLUE}@{GLUE_REVISION}"}

    def read(self) -> tuple[str, dict[str, Examples]]:
        """The source, and its splits as they are: `train`, then those of `dev`."""
        local = self._is_local()
        read = self._read_tsv if local else self._read_hub
        words = {name: read(name) for name in ("train", *self.dev)}
        if self.labels is None:
            label_of = self._score
        else:
            ids = self._class_ids(word for split in words.values() for word in split.labels)
            label_of = lambda word: ids[word.text]  # noqa: E731
        splits = {
            name: Examples(split.texts, [label_of(word) for word in split.labels], split.skipped)
            for name, split in words.items()
        }
        return str(self.data_dir) if local else f"{GLUE}@{GLUE_REVISION}", splits

    def read_test(self, split: str = "test", file: str | None = None) -> list[tuple[str, ...]]:
        """The texts of a split without labels, every row of it; local files of this kind all have a header.

        Args:
            split: its name on the hub, e.g. `test_matched`.
            file: the local file without `.tsv`, where its name is another.
        """
        if self._is_local():
            return self._read_unlabelled(self._path(file or split))
        table = hub_table(cast(str, self.subset), split)
        return list(zip(*(table[name] for name in self.fields), strict=True))

    def _read_unlabelled(self, path: Path) -> list[tuple[str, ...]]:
        # never lenient about the width: a row left out would shift the predictions of all that follow
        table = read_tsv(path, [self.column(name) for name in self.fields])
        return [tuple(self.text(text, f"{path}, line {line}") for text in row) for line, row in table.rows]

    def column(self, name: str) -> str:
        """The name of a field's column in a file with a header."""
        column = self.columns.get(name, name)
        return column if isinstance(column, str) else name

    def _is_local(self) -> bool:
        if self.data_dir is None and self.subset is None:
            raise UserError(f"task {self.name} is not on the hub; set task.data_dir=DIR, a folder with train.tsv")
        return self.data_dir is not None

    @property
    def _columns(self) -> list[str | int]:
        """The columns of the fields and of the label."""
        return [self.columns.get(name, name) for name in (*self.fields, "label")]

    def _path(self, split: str) -> Path:
        folder = given_path("task.data_dir", self.data_dir)
        if self.folder and (folder / self.folder).is_dir():
            folder /= self.folder
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; task.data_dir must hold {self._file_names(split)}")
        path = folder / f"{split}.tsv"
        if not path.is_file():
            raise UserError(f"{path}: no such file; task {self.name} needs {self._file_names(split)}")
        return path

    def _read_tsv(self, split: str) -> Examples:
        path = self._path(split)
        table = read_tsv(path, self._columns, self.lenient)
        texts = [tuple(self.text(text, f"{path}, line {line}") for text in row[:-1]) for line, row in table.rows]
        labels = [Word(row[-1].strip(), f"{path}, line {line}") for line, row in table.rows]
        return Examples(texts, labels, table.skipped)

    def _read_hub(self, split: str) -> Examples:
        table = hub_table(
            cast(str, self.subset), "train" if split == "train" else split.replace("dev", "validation", 1)
        )
        texts = list(zip(*(table[name] for name in self.fields), strict=True))
        labels = [
            Word(str(label), f"{GLUE} {self.subset} {split}, row {row}") for row, label in enumerate(table["label"])
        ]
        return Examples(texts, labels)

    def _file_names(self, split: str) -> str:
        splits = ("train", *self.dev)
        return ", ".join(f"{name}.tsv" for name in (splits if split in splits else [split]))

    def text(self, text: str, where: str) -> str:
        """The text itself.

        Raises:
            UserError: it is empty, and the task is not lenient.
        """
        if not self.lenient and not text.strip():
            raise UserError(f"{where}: an empty text; correct the row, or keep such rows with ++task.lenient=true")
        return text

    def _class_ids(self, words: Iterable[Word]) -> dict[str, int]:
        """The id of every label: classes are given by name in all the data, or by id in all of it (1 or 1.0)."""
        names = {name: number for number, name in enumerate(self.labels or ())}
        ids = {text: number for number in range(self.num_labels) for text in (str(number), f"{number}.0")}
        first: dict[str, Word] = {}
        for word in words:
            first.setdefault(word.text, word)
        neither = [word for text, word in first.items() if text not in names and text not in ids]
        if neither:
            raise UserError(
                f"{neither[0].where}: unknown label '{shown(neither[0].text)}'; "
                f"task {self.name} knows {', '.join(names)} or 0 to {self.num_labels - 1}"
            )
        no_name, no_id = (next((w for text, w in first.items() if text not in known), None) for known in (names, ids))
        if no_name and no_id:
            raise UserError(
                f"{no_name.where}: the label {no_name.text!r} is an id, but {no_id.text!r} ({no_id.where}) is a name; "
                "write all labels by name, or all as ids"
            )
        if no_name is no_id is None and any(names[text] != ids[text] for text in first):
            raise UserError(
                f"task {self.name}: the labels {', '.join(sorted(first))} can be names of classes or ids, which "
                "differ; call the classes otherwise in `labels`, e.g. class_1, and write that or ids into the data"
            )
        known = names if no_name is None else ids
        return {text: known[text] for text in first}

    def _score(self, word: Word) -> float:
        low, high = self.score_range or (-math.inf, math.inf)
        try:
            score = float("" if "_" in word.text else word.text)
        except ValueError:
            raise UserError(f"{word.where}: the score '{shown(word.text)}' is not a number") from None
        if not abs(score) <= LARGEST or not low <= score <= high:
            allowed = "finite" if self.score_range is None else f"from {low:g} to {high:g}"
            raise UserError(f"{word.where}: the score {word.text} is not allowed; scores must be {allowed}")
        return score

    def _choose(self, splits: Mapping[str, Examples]) -> dict[str, Examples]:
        """The splits to use: train thinned to `train_fraction`, then parted from `holdout`; and the joint split."""
        train = splits["train"]
        drawn = self._draw("train_fraction", range(len(train.texts)), self.train_fraction)
        held = self._draw("holdout", drawn, self.holdout)
        chosen = dict(splits) | {"train": train.select(sorted(set(drawn) - set(held)))}
        if held:
            chosen["holdout"] = train.select(held)
        if self.joint:
            chosen[f"{self.dev[0]}+holdout"] = chosen[self.dev[0]].joined(chosen["holdout"])
        return chosen

    def _draw(self, purpose: str, indices: Sequence[int], share: float) -> list[int]:
        """A share of `indices`, sorted; at least one unless the share is 0, and never all unless it is 1."""
        if share in (0, 1):
            return list(indices)[: int(share) * len(indices)]
        count = round(share * len(indices))
        if not 0 < count < len(indices):
            raise UserError(f"task.{purpose}={share} of {len(indices)} examples is {count}: too few are left")
        order = torch.randperm(len(indices), generator=stream(self.seed, purpose)).tolist()
        return sorted(indices[i] for i in order[:count])

    def tokenise(self, name: str, examples: Examples, tokenizer: Any) -> Split:
        """The examples as token ids, cut at `max_length`."""

        def compute() -> token_cache.Encoded:
            encoded = tokenizer(*zip_columns(examples.texts), truncation=True, max_length=self.max_length)
            return encoded["input_ids"], encoded.get("token_type_ids")

        return Split(name, *token_cache.encoded(examples.texts, tokenizer, self.max_length, compute), examples.labels)

    def _count_truncated(self, split: Split, examples: Examples, tokenizer: Any) -> int:
        """How many examples were cut: of those that fill `max_length`, the ones that are longer uncut."""
        full = [examples.texts[i] for i, length in enumerate(split.lengths) if length == self.max_length]
        if not full:
            return 0
        uncut = tokenizer(*zip_columns(full), truncation=False, verbose=False)["input_ids"]
        return sum(len(row) > self.max_length for row in uncut)

    # settings that cannot work

    def _check_names(self) -> None:
        for name in ("fields", "dev", "labels", "metrics"):
            value = getattr(self, name)
            if isinstance(value, str) or (value is None and name != "labels"):
                raise UserError(f"task {self.name}: `{name}` must be a list, it is {value!r}")
        self.fields, self.dev = list(self.fields), list(self.dev)
        if len(self.fields) not in (1, 2) or not self.dev:
            raise UserError(f"task {self.name}: `fields` must name one or two columns, `dev` at least one split")
        if len(set(self._columns)) < len(self._columns):
            raise UserError(f"task {self.name}: fields and label must be different columns, they are {self._columns}")
        if reserved := {"train", "holdout", f"{self.dev[0]}+holdout"} & set(self.dev):
            raise UserError(f"task {self.name}: `dev` has {', '.join(reserved)}, which names examples of train here")
        if self.labels is None:
            return
        if any(isinstance(label, bool) for label in self.labels):
            raise UserError(
                f'task {self.name}: YAML reads yes and no as true and false; quote the labels: ["no", "yes"]'
            )
        self.labels = [str(label) for label in self.labels]
        if odd := [label for label in self.labels if not label.isprintable()]:
            raise UserError(f"task {self.name}: the label {shown(repr(odd[0]))} has control characters")
        if len(set(self.labels)) < max(2, len(self.labels)):
            raise UserError(f"task {self.name}: `labels` must be at least two different names, or null for scores")

    def _check_metrics(self) -> None:
        self.metrics = list(self.metrics)
        known = SCORE_METRICS if self.labels is None else CLASS_METRICS
        unknown = [name for name in self.metrics if name not in known]
        if unknown or not self.metrics:
            raise UserError(f"task {self.name}: metrics {unknown} do not fit; choose from {', '.join(known)}")
        if not self.primary or not set(self.primary) <= set(self.metrics):
            raise UserError(f"task {self.name}: primary {self.primary} must be among metrics {self.metrics}")
        if "f1" in self.metrics and self.num_labels != 2:
            raise UserError(f"task {self.name}: f1 is the F1 of class 1 of two; there are {self.num_labels} classes")

    def _check_length(self, tokenizer: Any) -> None:
        pair = len(self.fields) == 2
        least = tokenizer.num_special_tokens_to_add(pair=pair) + len(self.fields)
        if self.max_length < least:
            raise UserError(f"task.max_length={self.max_length} leaves no room for text; the least is {least}")
        if self.max_length > tokenizer.model_max_length:
            raise UserError(
                f"task.max_length={self.max_length} is more than the {tokenizer.model_max_length} "
                "tokens that the backbone's tokenizer allows"
            )


def fingerprint(splits: Mapping[str, Examples]) -> str:
    """sha256 (hex) over split names, texts and labels, in order; scores enter as float32."""
    digest = hashlib.sha256()
    for name, examples in splits.items():
        labels = torch.tensor(examples.labels).tolist()
        for texts, label in zip(examples.texts, labels, strict=True):
            digest.update(json.dumps([name, *texts, label]).encode() + b"\n")
    return digest.hexdigest()


def hub_table(subset: str, split: str) -> Mapping[str, list[Any]]:
    """The columns of one split of GLUE at the pinned revision, from the local cache or the hub.

    Raises:
        UserError: the hub cannot be reached, or does not give the data.
    """
    import datasets

    # `load_dataset` asks the hub even for what it has; the prepared files of a pinned revision never change.
    cached = Path(datasets.config.HF_DATASETS_CACHE, GLUE.replace("/", "___"), subset, "0.0.0", GLUE_REVISION)
    file = cached / f"{GLUE.rpartition('/')[2]}-{split}.arrow"
    if file.is_file():
        return datasets.Dataset.from_file(str(file)).to_dict()

    from increlora.glue.hub import require_hub

    require_hub("task.data_dir=DIR")
    try:
        return datasets.load_dataset(GLUE, subset, split=split, revision=GLUE_REVISION).to_dict()
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{GLUE} {subset} could not be loaded ({reason}); set task.data_dir=DIR") from error


def zip_columns(texts: Sequence[tuple[str, ...]]) -> list[list[str]]:
    """Rows of one or two texts as one or two lists, as a tokenizer takes them."""
    return [list(column) for column in zip(*texts, strict=True)]
