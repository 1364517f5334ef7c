"""Batches of equal size, bucketed by length, whose order is a function of (seed, epoch) alone."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from increlora.streams import stream

if TYPE_CHECKING:
    from increlora.glue.tasks import Split


def epoch_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int, pool: int = 50) -> list[list[int]]:
    """The batches of one epoch: ceil(n / batch_size) lists of exactly `batch_size` indices.

    The examples are shuffled, cut into pools of `pool` batches, sorted by length within each pool
    (ties stay shuffled) and cut into batches, which are shuffled in turn. Every example occurs; the
    places left over in the last batch go to the first examples of the shuffled epoch.

    Args:
        lengths: tokens of every example.
        pool: batches sorted together; more pads less and mixes less.
    """
    generator = stream(seed, "data", epoch)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    order = _filled(order, batch_size)
    pools = _cut(order, pool * batch_size)
    batches = [batch for part in pools for batch in _cut(sorted(part, key=lengths.__getitem__), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def evaluation_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Every example exactly once, shortest first; the last batch may be smaller."""
    return _cut(sorted(range(len(lengths)), key=lengths.__getitem__), batch_size)


def collate(split: "Split", indices: Sequence[int], pad_id: int) -> dict[str, Tensor]:
    """The tensors of one batch, padded on the right to its longest example.

    Returns:
        input_ids, attention_mask and, where the tokeniser gives them, token_type_ids: (batch, longest)
        int64; labels: (batch,) int64 class ids or float32 scores.
    """
    rows = [split.input_ids[i] for i in indices]
    width = max(len(row) for row in rows)
    batch = {
        "input_ids": _padded(rows, width, pad_id),
        "attention_mask": _padded([[1] * len(row) for row in rows], width, 0),
        "labels": torch.tensor([split.labels[i] for i in indices]),
    }
    if split.token_type_ids is not None:
        batch["token_type_ids"] = _padded([split.token_type_ids[i] for i in indices], width, 0)
    return batch


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The same batch on a device."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def padding_share(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """Padded tokens over real tokens when every batch is padded to its longest example."""
    real = sum(lengths[i] for batch in batches for i in batch)
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return (padded - real) / real


def _filled(order: list[int], batch_size: int) -> list[int]:
    """`order` continued from its own start up to a multiple of `batch_size`."""
    total = -(-len(order) // batch_size) * batch_size
    return [order[i % len(order)] for i in range(total)]


def _cut(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _padded(rows: Sequence[Sequence[int]], width: int, value: int) -> Tensor:
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])
