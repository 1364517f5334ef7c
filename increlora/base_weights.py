"""Whether a model's own weights are still those that it was prepared with: a checksum of every tensor."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

Checksum = tuple[tuple[int, ...], str, int]  # shape, dtype, sum of the values' bits


def tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers that a state dict holds, by every name that they have."""
    yield from model.named_parameters(remove_duplicate=False)
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}".lstrip("."), buffer


@torch.no_grad()
def checksums(named: dict[str, Tensor]) -> dict[str, Checksum]:
    """The checksum of every tensor; it reads all of them once, and the device once per kind of device."""
    sums: dict[str, Tensor] = {name: _sum(tensor) for name, tensor in named.items()}
    by_device: dict[torch.device, list[str]] = {}
    for name, total in sums.items():
        by_device.setdefault(total.device, []).append(name)
    values: dict[str, int] = {}
    for names in by_device.values():
        values |= dict(zip(names, torch.stack([sums[name] for name in names]).tolist(), strict=True))
    return {name: (tuple(tensor.shape), str(tensor.dtype), values[name]) for name, tensor in named.items()}


def _sum(tensor: Tensor) -> Tensor:
    if tensor.device.type == "meta":  # a model without values, which only tells its shapes
        return torch.zeros((), dtype=torch.int64)
    content = tensor.detach().contiguous().flatten().view(torch.uint8)
    whole = len(content) // 8 * 8
    # as words of 8 bytes: torch adds up smaller numbers fifty times as slowly
    return content[:whole].view(torch.int64).sum() + content[whole:].sum()
