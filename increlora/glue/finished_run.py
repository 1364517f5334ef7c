"""The trained model of a run directory, rebuilt from its result file and one of its checkpoints.

The result file names the classes to build. Only classes of this project are built, and of packages that the person at
the keyboard names (`trust=PACKAGE`): a file of somebody else's runs no code.
"""

import importlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from increlora import result_files
from increlora.errors import UserError
from increlora.glue import checkpoint, config, identity, results, token_cache
from increlora.glue.backbone import Backbone
from increlora.glue.batching import collate, evaluation_batches, to_device
from increlora.glue.digest import sha256
from increlora.glue.settings import Settings
from increlora.glue.tasks import Examples, Task
from increlora.method import Method

# overrides that a finished run takes -> their keys in its configuration
OVERRIDES = {
    "backbone.path": "backbone.path",
    "task.data_dir": "task.data_dir",
    "task.lenient": "task.lenient",
    "method.pattern": "method.pattern",
    "device": "train.device",
    "precision": "train.precision",
}
TRUSTED = ("increlora", "baselines")
CHUNK = 16  # batches that are sorted by length together


@dataclass
class Trained:
    """A trained model in evaluation mode, and the parts of its run.

    Args:
        result: the content of the result file.
        checkpoint: the name of the checkpoint, `best` or `last`.
        settings: precision and device to compute with; fp32 by default.
        model, tokenizer: a sequence classifier and a tokenizer of transformers.
    """

    result: Mapping[str, Any]
    checkpoint: str
    settings: Settings
    backbone: Backbone
    task: Task
    method: Method
    model: Any
    tokenizer: Any

    def logits(self, texts: Sequence[tuple[str, ...]], batch_size: int = 64) -> Tensor:
        """Logits (examples, outputs), fp32 on the CPU, in the order of the texts; batches are sorted by length."""
        split = self.task.tokenise("texts", Examples(list(texts), [0] * len(texts)), self.tokenizer)
        rows = torch.empty(len(texts), self.task.num_labels)
        for indices in evaluation_batches(split.lengths, batch_size):
            batch = collate(split, indices, self.tokenizer.pad_token_id)
            del batch["labels"]
            rows[indices] = self._forward(batch).float().cpu()
        if not rows.isfinite().all():
            raise UserError(
                f"the model's outputs are no numbers, so they say nothing (the run {self.result['status']}, checkpoint "
                f"{self.checkpoint}); use another checkpoint or another run"
            )
        return rows

    def stream(self, texts: Iterable[tuple[str, ...]], batch_size: int = 64) -> Iterator[Tensor]:
        """The logits of chunk after chunk of the texts, in their order and in constant memory."""
        if batch_size < 1:
            raise UserError(f"the batch size must be at least 1, it is {batch_size}")
        rows = iter(texts)
        size = min(CHUNK * batch_size, token_cache.FROM - 1)  # larger chunks would be kept on disk
        while chunk := list(itertools.islice(rows, size)):
            yield self.logits(chunk, batch_size)

    def merge(self) -> None:
        """Fold the update into the weights, in fp32 only; a prediction then costs as much as with the plain model.

        In half precision a merged weight has too few digits for a small update, so the model is not changed there.
        """
        if self.settings.precision == "fp32" and self.method.can_merge:
            self.method.merge(self.model)

    @torch.inference_mode()
    def _forward(self, batch: dict[str, Tensor]) -> Tensor:
        with self.settings.autocast():
            return self.model(**to_device(batch, self.settings.torch_device)).logits


def load(run_dir: Path, name: str = "best", overrides: Sequence[str] = ()) -> Trained:
    """Rebuild the model of a finished run.

    Args:
        run_dir: the directory that holds `result.json` and the checkpoints.
        name: `best` (on dev) or `last`.
        overrides: `key=value` for the keys of `OVERRIDES`: where files lie and where to compute; and
            `trust=PACKAGE`, whose classes may be built too.

    Raises:
        UserError: no finished run, a checkpoint that is missing, broken or of another run, or a backbone or
            method that reads other files than the run did.
    """
    result = read_result(run_dir)
    state = _state(run_dir / f"{name}.safetensors", result)
    cfg = run_config(result["config"], overrides)
    settings, method, task, backbone = (config.build(cfg[key]) for key in ("train", "method", "task", "backbone"))
    model = backbone.model(task.num_labels, task.head_dropout)
    with config.readable_errors(cfg.method):
        if other := results.changed_inputs(result, identity.inputs(backbone, method)):
            raise UserError(
                f"{run_dir} was trained on other {results.in_words(other)} than those given here.\n"
                "Give those it was trained on: backbone.path=DIR, method.pattern=RUN_DIR"
            )
        method.prepare(model, settings.total_steps(result["data"]["sizes"]["train"]))
    checkpoint.load_model_state(model, method, state)
    if method.ranks() != result["ranks"].get(name, {}):
        raise UserError(f"{run_dir}: the ranks in {name}.safetensors are not those in {result_files.FILE_NAME}")
    model.to(settings.torch_device).eval()
    return Trained(result, name, settings, backbone, task, method, model, backbone.tokenizer())


def run_config(stored: Mapping[str, Any], overrides: Sequence[str]) -> DictConfig:
    """The configuration of a finished run, for this machine.

    Raises:
        UserError: an override that would make it another run, or a class that is not trusted.
    """
    cfg = OmegaConf.create(result_files.up_to_date(stored))
    overrides, named = parted(overrides)
    refuse_strangers(OmegaConf.to_container(cfg), (*TRUSTED, *named))
    for override in ("device=auto", "precision=fp32", *overrides):
        key, _, value = override.lstrip("+").partition("=")
        if key not in OVERRIDES:
            raise UserError(f"'{override}': of a finished run only {', '.join(OVERRIDES)} can be set (key=value)")
        OmegaConf.update(cfg, OVERRIDES[key], config.WORDS.get(value.lower(), value), force_add=True)
    return cfg


def parted(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The overrides without `trust=`, and the packages that it names."""
    trust = [override.removeprefix("trust=") for override in overrides if override.startswith("trust=")]
    return [o for o in overrides if not o.startswith("trust=")], [name for names in trust for name in names.split(",")]


def refuse_strangers(config: Any, trusted: Sequence[str]) -> None:
    """Return if every class that a configuration names is one of a trusted package, and nothing is left to resolve.

    Raises:
        UserError: another class, something that is not a class, or an interpolation, which could make one later.
    """
    if isinstance(config, str) and "${" in config:
        raise UserError(f"the run's configuration has the interpolation {config[:100]!r}; run.py writes none")
    if isinstance(config, list):
        for item in config:
            refuse_strangers(item, trusted)
    if not isinstance(config, dict):
        return
    for part in (*config, *config.values()):
        refuse_strangers(part, trusted)
    if (name := config.get("_target_")) is not None and not _is_of(str(name), trusted):
        raise UserError(
            f"the run's configuration asks for {str(name)[:100]!r}, which is not a class of {', '.join(trusted)}.\n"
            "If you know the package and trust the run, add trust=PACKAGE."
        )


def _is_of(name: str, packages: Sequence[str]) -> bool:
    """Whether a dotted name is a class that a package defines; nothing else is imported to find out."""
    if not name.startswith(tuple(f"{package}." for package in packages)):
        return False
    module, _, leaf = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), leaf, None)
    except (ImportError, ValueError):
        return False
    return isinstance(found, type) and f"{found.__module__}.".startswith(tuple(f"{package}." for package in packages))


def read_result(run_dir: Path) -> dict[str, Any]:
    """The result of a finished run.

    Raises:
        UserError: the directory holds none.
    """
    path = run_dir / result_files.FILE_NAME
    if not path.is_file():
        result_files.refuse_unfinished(run_dir)
        raise UserError(f"{path}: no such file; give the directory of a finished run, as run.py names it at its end")
    return result_files.read(path)


def _state(path: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """Structure and weights in a checkpoint that belongs to the result."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; the run's weights are needed beside its {result_files.FILE_NAME}")
    document = checkpoint.read(path)
    recorded = result.get("weights", {}).get(path.stem)  # older results do not say
    if recorded is not None and sha256(path) != recorded:
        raise UserError(
            f"{path} is not the file of weights that {result_files.FILE_NAME} is about (its sha256 differs): it was "
            "changed, or written by a run that was stopped. Run again with overwrite=true."
        )
    processes = document["identity"].get("processes", 1)
    changed = identity.changed_since(
        result_files.up_to_date(document["identity"]),
        identity.of_checkpoint(result["config"], result["inputs"], processes),
    )
    if changed:
        raise UserError(
            f"{path} is of another run than {result_files.FILE_NAME}: it differs in {', '.join(changed[:5])}"
        )
    return document["state"]
