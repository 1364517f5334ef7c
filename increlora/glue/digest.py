"""sha256 of files, and the refusal of a file that is not the published one."""

import functools
import hashlib
from pathlib import Path

from increlora.errors import UserError, first_line


def sha256(file: Path) -> str:
    """The digest (hex) of a file's bytes.

    Raises:
        UserError: it cannot be read.
    """
    try:
        state = file.stat()
        return _sha256(file, state.st_size, state.st_mtime_ns)
    except OSError as error:
        raise UserError(f"cannot read {file}: {first_line(error)}") from error


@functools.cache  # weights are large, and a sweep asks for every one of its runs
def _sha256(file: Path, size: int, changed: int) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def require_published(file: Path, published: str) -> None:
    """Return if the file has the digest `published`.

    Raises:
        UserError: it has another, or cannot be read.
    """
    if (digest := sha256(file)) != published:
        raise UserError(
            f"{file} is not the published file: its sha256 is {digest}, not {published}.\n"
            "Delete it and install or download it again, or set backbone.path=DIR to use a file of your own."
        )
