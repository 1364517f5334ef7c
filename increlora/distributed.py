"""Several processes that train as one: ranks, means and gathers; with a single process all of it has no effect.

Started by `torchrun` or `accelerate launch`, which set the environment; there is no launcher here.
"""

import os
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from increlora.errors import UserError

# what torchrun and accelerate set, and what the launchers of MPI set
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def start(device: str) -> None:
    """Join the processes that a launcher started, if any.

    Args:
        device: cpu (gloo), cuda (nccl), or auto.
    """
    if dist.is_initialized() or all(_number(name, 1) < 2 for name in SIZES):
        return
    if os.environ.get("MASTER_ADDR") is None and "WORLD_SIZE" in os.environ:
        raise UserError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but MASTER_ADDR is not set: start the processes with torchrun or "
            "accelerate launch, or unset WORLD_SIZE, RANK and LOCAL_RANK for a single process"
        )
    rank, _, port = (_number(name, 0) for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"))
    if rank >= (size := max(_number(name, 1) for name in SIZES)):
        raise UserError(f"RANK={rank} of {size} processes: they are numbered from 0; start them with torchrun")
    if port > 65535:
        raise UserError(f"MASTER_PORT={port} is no port; the largest is 65535")
    from accelerate import PartialState

    on_gpu = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    PartialState(cpu=not on_gpu)


def _number(name: str, otherwise: int) -> int:
    value = os.environ.get(name, "") or str(otherwise)
    if not value.isdecimal():
        raise UserError(f"the environment variable {name} must be a whole number, it is {value!r}")
    return int(value)


def local_rank() -> int:
    """The number of this process on its machine, from 0: the GPU it uses."""
    return int(os.environ.get("LOCAL_RANK", "0")) if dist.is_initialized() else 0


def stop() -> None:
    """Leave the group of processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this process writes and logs."""
    return rank() == 0


def _speaking(call: Callable) -> Callable:
    @wraps(call)
    def spoken(*arguments: Any) -> Any:
        try:
            return call(*arguments)
        except RuntimeError as error:  # gloo and nccl raise it, or subclasses, when a peer is gone
            raise UserError(
                f"lost contact with another process ({str(error).splitlines()[0][:120]}).\n"
                "Its own message is above. The last checkpoint is good, and the same command continues from it."
            ) from error

    return spoken


@_speaking
def mean(tensor: Tensor) -> Tensor:
    """The mean of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace every gradient by its mean over all processes, also of parameters that train only since a growth."""
    if not dist.is_initialized():
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in by_dtype.values():
        flat = mean(_flatten_dense_tensors(gradients))
        if len(gradients) > 1:
            torch._foreach_copy_(gradients, list(_unflatten_dense_tensors(flat, gradients)))
        else:  # flat may be the gradient itself, which cannot be copied onto itself
            gradients[0].copy_(flat.view_as(gradients[0]))


@_speaking
def gather(value: Any) -> list[Any]:
    """The value of every process, in order of their ranks, on every process."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
