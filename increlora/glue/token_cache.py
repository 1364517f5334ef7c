"""Token ids kept on disk, so that a large task is tokenised once per tokenizer and length, not once per run.

A file is found by a fingerprint of everything that the ids depend on: the texts, the tokenizer with its whole
vocabulary, the length, the versions. A file that cannot be read or written is ignored and the ids are computed again,
so the cache changes no result.
"""

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from increlora.glue.cache_folder import cache_folder

log = logging.getLogger(__name__)
FROM = 10_000  # examples: with fewer, tokenising is as fast as reading the cache
FORMAT = 2  # with a checksum
NAMES = ("input_ids", "token_type_ids")
Encoded = tuple[list[list[int]], list[list[int]] | None]  # token ids, and segment ids if the tokenizer has any


def folder() -> Path:
    """Where the files lie."""
    return cache_folder("tokens")


def encoded(
    texts: Sequence[tuple[str, ...]], tokenizer: Any, max_length: int, compute: Callable[[], Encoded]
) -> Encoded:
    """What `compute` gives, from the cache if it is there.

    Args:
        texts: one tuple of texts per example.
        tokenizer: a tokenizer of transformers; only fast ones are cached.
    """
    if len(texts) < FROM or not getattr(tokenizer, "is_fast", False):
        return compute()
    path = folder() / f"{fingerprint(texts, tokenizer, max_length)}.npz"
    found = _read(path)
    if found is None:
        found = compute()
        _write(path, found)
    return found


def fingerprint(texts: Sequence[tuple[str, ...]], tokenizer: Any, max_length: int) -> str:
    """sha256 over all that token ids depend on."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # what the last call set; every call sets its own
    backend.no_padding()
    digest = hashlib.sha256(backend.to_str().encode())
    versions = f"{FORMAT} {max_length} {version('tokenizers')} {version('transformers')}"
    digest.update(f"{versions} {tokenizer.truncation_side} {type(tokenizer).__name__}".encode())
    for example in texts:
        for text in example:
            data = text.encode()
            digest.update(f"{len(data)} ".encode() + data)
        digest.update(b";")
    return digest.hexdigest()


def _read(path: Path) -> Encoded | None:
    try:
        with np.load(path) as file:
            ends = np.cumsum(file["lengths"])[:-1]
            if file["checksum"].tobytes() != _checksum({name: file[name] for name in file if name != "checksum"}):
                return None
            rows = {name: [row.tolist() for row in np.split(file[name], ends)] for name in NAMES if name in file}
        return rows["input_ids"], rows.get("token_type_ids")
    except Exception:  # damage shows itself in many ways, and the ids can always be computed
        return None


def _checksum(arrays: Mapping[str, Any]) -> bytes:
    """sha256 over name, type, shape and bytes of every array."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape} ".encode() + arrays[name].tobytes())
    return digest.digest()


def _write(path: Path, found: Encoded) -> None:
    arrays: dict[str, Any] = {name: np.concatenate([np.array(row, dtype=np.int32) for row in rows])
              for name, rows in zip(NAMES, found, strict=True) if rows is not None}  # fmt: skip
    arrays["lengths"] = np.array([len(row) for row in found[0]])
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez(file, checksum=np.frombuffer(_checksum(arrays), np.uint8), **arrays)
        os.replace(temporary, path)
    except OSError as error:
        log.info("tokens are not cached: %s", error)
        with contextlib.suppress(OSError):
            temporary.unlink()
