"""Evaluation: predictions, metrics and loss of a model on whole splits, and the best of several evaluations."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from increlora import distributed
from increlora.glue.batching import collate, evaluation_batches, to_device
from increlora.glue.settings import Settings
from increlora.glue.tasks import Split, Task, TaskData


@dataclass
class Evaluation:
    """One point of the curve: what an evaluation measured, and the model it measured."""

    step: int
    epoch: float
    scores: dict[str, dict[str, float]]  # split -> metric -> value; the metric "score" is the primary one
    ranks: dict[str, int]
    parameters: dict[str, int]
    seconds: float
    orthogonal_penalty: float | None = None  # unweighted; None where the method has none
    orthogonal_penalty_active: float | None = None  # of the active components alone
    orthogonal_penalty_reserve: float | None = None  # of the reserves alone; None where there are none


def best(curve: list[Evaluation], split: str) -> Evaluation | None:
    """The evaluation with the highest primary score on a split, the earliest of equals."""
    return max(curve, key=lambda evaluation: evaluation.scores[split]["score"], default=None)


def predict(model: nn.Module, split: Split, task: Task, settings: Settings, pad_id: int = 0) -> tuple[Tensor, float]:
    """Predictions for a split in its own order, (examples,), and the mean task loss over it.

    The batches are shared out over the processes; every process gets all predictions.
    """
    device = settings.torch_device
    predictions: dict[int, Any] = {}
    total_loss = 0.0
    batches = evaluation_batches(split.lengths, settings.eval_batch_size)
    model.eval()
    with torch.inference_mode(), settings.autocast():
        for indices in batches[distributed.rank() :: distributed.processes()]:
            batch = to_device(collate(split, indices, pad_id), device)
            labels = batch.pop("labels")
            logits = model(**batch).logits
            total_loss += task.loss(logits, labels).item() * len(indices)
            predictions |= dict(zip(indices, task.predict(logits).tolist(), strict=True))
    shares, losses = zip(*distributed.gather((predictions, total_loss)), strict=True)
    predictions = {index: value for share in shares for index, value in share.items()}
    return torch.tensor([predictions[i] for i in range(len(split))]), sum(losses) / len(split)


def evaluate(
    model: nn.Module, task: Task, data: TaskData, settings: Settings, pad_id: int = 0
) -> dict[str, dict[str, float]]:
    """Every metric of the task and the mean loss on every evaluation split."""
    scores = {}
    for name, split in data.evaluation.items():
        predictions, loss = predict(model, split, task, settings, pad_id)
        scores[name] = task.evaluate(predictions.tolist(), split.labels) | {"loss": loss}
    return scores
