"""Independent random streams: one reproducible generator per (seed, purpose).

Data order, head initialisation, dropout and the components of every matrix have a stream each. So the growth of one
matrix changes no other draw, and equal seeds give runs of different methods the same data order and the same head.
"""

import hashlib

import torch


def derive_seed(seed: int, *purpose: object) -> int:
    """A 63-bit seed that depends on `seed` and on every part of `purpose`, the same on every machine."""
    text = "\x1f".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def stream(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator of its own for one purpose, e.g. `stream(41, "component", matrix, 3)`."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))
