"""For files that are written or compared: JSON, a failed write as a message, differences of two files by dotted key."""

import contextlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from increlora.errors import UserError, first_line


@contextlib.contextmanager
def writing(path: Path, *errors: type[Exception]) -> Iterator[None]:
    """Turn a failed write into a UserError that names the file.

    Args:
        errors: what a library that writes raises beside OSError.
    """
    failures: tuple[type[Exception], ...] = (OSError, *errors)
    try:
        yield
    except failures as error:
        raise UserError(
            f"cannot write {path}: {first_line(error)}.\n"
            "Existing files are complete. Free some space or repair the folder; the same command then continues."
        ) from error


@contextlib.contextmanager
def replacing(path: Path, follow: bool = True) -> Iterator[Path]:
    """Write a file whole or not at all: give the path to write to, which then takes the place of `path`.

    A kill or a full disk leaves what was there. An existing file keeps its rights.

    Args:
        follow: a link keeps leading to its target; else a file takes the place of the link.

    Raises:
        UserError: it cannot be written, or is no regular file (a folder, device or pipe).
    """
    with writing(path):
        target = path.resolve() if follow else path
        if target.exists() and not target.is_file():
            raise UserError(f"{path} is no regular file; give the name of a file")
        temporary = target.with_name(f".{target.name[:100]}.{os.getpid()}.tmp")
        temporary.unlink(missing_ok=True)  # it may be a link
        try:
            yield temporary
            if target.exists():
                os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, follow: bool = True) -> None:
    """Write a text file whole or not at all (`replacing`).

    Raises:
        UserError: it cannot be written.
    """
    with replacing(path, follow) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def shown(text: str, most: int = 200) -> str:
    """Somebody's text for a message: on one line, without codes that a terminal would obey, and not too long."""
    cut = text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in cut)


def changed_keys(a: Any, b: Any, prefix: str = "") -> list[str]:
    """The dotted keys in which two nested mappings differ."""
    if not (isinstance(a, Mapping) and isinstance(b, Mapping)):
        return [] if a == b else [prefix]
    missing = object()
    keys = [*a, *(key for key in b if key not in a)]
    return [
        path
        for key in keys
        for path in changed_keys(a.get(key, missing), b.get(key, missing), f"{prefix}.{key}".lstrip("."))
    ]


def given_path(key: str, value: Any) -> Path:
    """A path that a person gave under a key.

    Raises:
        UserError: it is no text, or in the home of somebody who is not known here.
    """
    if not isinstance(value, str | Path):
        raise UserError(f"{key}={value}: a path must be text; for a folder of that name write {key}=./{value}")
    try:
        return Path(value).expanduser()
    except RuntimeError as error:
        raise UserError(f"{key}={value}: {first_line(error)}") from None


# JSON


def parsed_json(text: str | bytes) -> Any:
    """What JSON text says.

    Raises:
        ValueError: it is no JSON, nests too deeply, or a key comes twice in an object.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("it nests too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {shown(repr(next(key for key in keys if keys.count(key) > 1)))} comes twice")
    return found


def as_json(value: Any, **options: Any) -> str:
    """Plain data as JSON; a number that is not finite becomes null, for JSON has none.

    Args:
        options: of `json.dumps`.
    """
    return json.dumps(_without_infinite(value), allow_nan=False, **options)


def _without_infinite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_infinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
