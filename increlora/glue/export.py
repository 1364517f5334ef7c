"""A finished run in other libraries' formats: a PEFT LoRA adapter or the merged model, each with its model card."""

from pathlib import Path
from typing import Any

from increlora.errors import UserError
from increlora.glue.finished_run import Trained
from increlora.glue.model_card import model_card
from increlora.integrations import peft_export


def write_adapter(
    trained: Trained, folder: Path, base: str | None = None, tokenizer: bool = True, pad_to: int | None = None
) -> None:
    """Write a run's adapter to an empty folder: what `save_peft_adapter` writes, the tokenizer and `README.md`.

    Args:
        tokenizer: False leaves it out; it is then taken from the base model.
        base: the base model's name to write down; None is `backbone.path` if given, else the hub's name.
        pad_to: the rank of every matrix in the adapter, filled up with zeros; None: its own.

    Raises:
        UserError: the update is no product of low-rank factors, or there is no base model to load under it.
    """
    base = base or base_model(trained)
    revision = trained.backbone.revision
    config, tensors = peft_export.adapter(trained.method, trained.model, base, "SEQ_CLS", revision, pad_to)
    if base_model(trained) is None:
        raise UserError(
            f"backbone {trained.backbone.name} was drawn at random, so there is no base model to load an adapter on; "
            "the merged model can be written instead"
        )
    peft_export.save_tensors(config, tensors, folder)
    if tokenizer:
        trained_tokenizer(trained).save_pretrained(folder)
    card = model_card(trained, "peft", base, base if base and not tokenizer else "THIS_FOLDER")
    (folder / "README.md").write_text(card, encoding="utf-8")


def write_merged(trained: Trained, folder: Path) -> None:
    """Write the model with the update folded in, the tokenizer and `README.md`; `trained.model` is merged afterwards.

    Raises:
        UserError: the method cannot be merged.
    """
    trained.method.merge(trained.model)
    labels = trained.task.labels or ["score"]
    trained.model.config.id2label = dict(enumerate(labels))
    trained.model.config.label2id = {label: i for i, label in enumerate(labels)}
    trained.model.config.problem_type = "single_label_classification" if trained.task.labels else "regression"
    trained.model.save_pretrained(folder)
    trained_tokenizer(trained).save_pretrained(folder)
    (folder / "README.md").write_text(model_card(trained, "merged", base_model(trained)), encoding="utf-8")


def base_model(trained: Trained) -> str | None:
    """The encoder's name as `from_pretrained` takes it; None if it was drawn at random."""
    return None if trained.backbone.weights == "random" else trained.backbone.path or trained.backbone.hub


def trained_tokenizer(trained: Trained) -> Any:
    """The tokenizer; with `truncation=True` it cuts where the run did."""
    trained.tokenizer.model_max_length = trained.task.max_length
    return trained.tokenizer
