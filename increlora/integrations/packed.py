"""Plain values and tensors as one vector of bytes, so that any format for weights can hold them beside the weights."""

import ctypes
import io
from typing import Any

import torch
from torch import Tensor

from increlora.components import STATE
from increlora.errors import UserError


def pack(state: dict[str, Any]) -> Tensor:
    """The vector, (bytes,) of uint8."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def unpack(packed: Tensor) -> dict[str, Any]:
    """What `pack` was given.

    Raises:
        UserError: something else was made of the vector, as where all of a state is averaged or cast.
    """
    packed = packed.cpu().contiguous()
    content = ctypes.string_at(packed.data_ptr(), packed.nbytes)  # torch gives bytes only by way of numpy
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception:
        raise UserError(
            f"`{STATE}` in the loaded state is damaged, or was changed with the weights (cast, averaged): it holds "
            "ranks and step, not weights; keep it as it was saved"
        ) from None
