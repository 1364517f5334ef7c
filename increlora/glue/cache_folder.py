"""Where the project keeps what it can make again: token ids, models put together from pieces."""

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """`name` in `INCRELORA_CACHE`, or in ~/.cache/increlora; it need not exist."""
    return Path(os.environ.get("INCRELORA_CACHE", "~/.cache/increlora")).expanduser() / name
