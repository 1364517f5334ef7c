"""Independent random streams: one reproducible generator per (seed, purpose).

Data order, head initialisation, dropout and the components of every matrix each draw from a stream
of their own, so that growing one matrix shifts nothing else and equal seeds pair runs of different
methods (same data order, same head).
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
