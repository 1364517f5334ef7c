"""Pretrained models that a package index delivers: a folder in one package, or one zip in pieces, a package each."""

import errno
import importlib.util
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from increlora.errors import UserError, first_line
from increlora.files import writing
from increlora.glue.cache_folder import cache_folder
from increlora.glue.digest import require_published


def packaged_folder(package: Mapping[str, Any], name: str, sha256: str | None) -> Path | None:
    """The folder with a model's files; None if the packages are not installed.

    Args:
        package: `module` and `folder` within it; or `pieces` of a zip (distribution -> name of its piece, in order),
            `folder` within the zip and the `files` to take out of it.
        name: the backbone's, to call the folder by that holds what was taken out.
        sha256: digest of model.safetensors, checked when it is taken out.

    Raises:
        UserError: the pieces are broken or not those of the published file, or the cache cannot be written.
    """
    if "pieces" in package:
        return _put_together(package, cache_folder("models") / f"{name}-{(sha256 or 'any')[:12]}", sha256)
    found = importlib.util.find_spec(package["module"])  # finds, does not import
    if found is None or not found.submodule_search_locations:
        return None
    return Path(found.submodule_search_locations[0]) / package["folder"]


def _put_together(package: Mapping[str, Any], target: Path, sha256: str | None) -> Path | None:
    """`target` with the files of the zip, made if it is not there; it appears whole or not at all."""
    if target.is_dir():
        return target
    pieces = _installed(package["pieces"])
    if pieces is None:
        return None
    from filelock import FileLock

    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):  # a second process waits; the lock of one that is killed is free
            if not target.is_dir():
                making = target.with_name(f"{target.name}.making")
                shutil.rmtree(making, ignore_errors=True)  # left by one that was killed
                making.mkdir()
                try:
                    _extract(pieces, package, making)
                    if sha256 is not None:
                        require_published(making / "model.safetensors", sha256)
                    os.replace(making, target)
                finally:
                    shutil.rmtree(making, ignore_errors=True)
    return target


def _installed(pieces: Mapping[str, str]) -> list[Path] | None:
    """Where the pieces are; None if a package is missing. Their folders' names are none that could be imported."""
    found = []
    for package, piece in pieces.items():
        try:
            files = distribution(package).files or []
        except PackageNotFoundError:
            return None
        found += [Path(str(file.locate())) for file in files if file.name == piece][:1]
    return found if len(found) == len(pieces) else None


def _extract(pieces: Iterable[Path], package: Mapping[str, Any], folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder) as joined:
            for piece in pieces:
                with piece.open("rb") as opened:
                    shutil.copyfileobj(opened, joined)
            with zipfile.ZipFile(joined) as archive:
                for file in package["files"]:
                    with archive.open(f"{package['folder']}/{file}") as packed, (folder / file).open("wb") as plain:
                        shutil.copyfileobj(packed, plain)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOENT, errno.EINVAL):  # a seek before the start
            raise
        raise UserError(
            f"the packages {', '.join(package['pieces'])} do not hold the pieces of one zip with this model: "
            f"{first_line(error)}.\nInstall them again: pip install --force-reinstall {package['requirement']}"
        ) from error
