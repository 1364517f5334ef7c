"""Where a pretrained model's files are: a folder, installed packages, the hub's cache or the hub."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from increlora.errors import UserError, first_line
from increlora.files import given_path
from increlora.glue.hub import require_hub
from increlora.glue.packaged import packaged_folder

# what a folder must hold: the first of the alternatives that is there, each some files
Alternatives = Sequence[Sequence[str]]
CONFIG: Alternatives = (("config.json",),)
WEIGHTS: Alternatives = (("model.safetensors",), ("pytorch_model.bin",))
OPTIONAL = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True)
class ModelFiles:
    """The places of one model's files; the fields are those of `Backbone` of the same names."""

    name: str
    hub: str | None
    revision: str | None
    package: dict[str, Any] | None
    path: str | None
    sha256: str | None

    def folder(self, *needs: Alternatives) -> Path:
        """The folder that holds the needed files: one on this machine, else the hub's.

        Raises:
            UserError: no such folder or files, or no hub.
        """
        folder = self.present(*needs)
        if folder is None and self.hub is None:
            raise UserError(
                f"backbone {self.name} has no published weights: set backbone.weights=random or backbone.path=DIR"
            )
        return folder or self._download(needs)

    def present(self, *needs: Alternatives) -> Path | None:
        """The folder on this machine that holds the needed files: `path`, else the package's, else the hub's cache.

        Raises:
            UserError: `path` is no such folder.
        """
        if self.path is not None:
            return _complete_folder(self.path, needs)
        packaged = self._package_folder()
        if packaged is not None and not _lacking(packaged, needs):
            return packaged
        return None if self.hub is None else _cached(self.hub, self.revision, needs)

    def described(self) -> Path | None:
        """`path`, if it holds a config.json.

        Raises:
            UserError: there is no such folder.
        """
        folder = None if self.path is None else _complete_folder(self.path, ())
        return None if folder is None or _lacking(folder, (CONFIG,)) else folder

    def _package_folder(self) -> Path | None:
        return None if self.package is None else packaged_folder(self.package, self.name, self.sha256)

    def _download(self, needs: Sequence[Alternatives]) -> Path:
        require_hub(self._instead())
        from huggingface_hub import HfApi, snapshot_download

        try:
            offered = set(HfApi().list_repo_files(self.hub, revision=self.revision))
            files = [name for need in needs for name in _first_offered(need, offered)]
            files += [name for name in OPTIONAL if name in offered]
            folder = Path(snapshot_download(self.hub, revision=self.revision, allow_patterns=files))
        # the client's network errors have come from three libraries so far, without a common class
        except Exception as error:
            raise UserError(
                f"{self.hub} could not be fetched from the hub: {first_line(error)}\nWithout it: {self._instead()}"
            ) from error
        lacking = _lacking(folder, needs)
        if lacking:
            raise UserError(f"{self.hub} on the hub lacks {', '.join(lacking)}.\nWithout it: {self._instead()}")
        return folder

    def _instead(self) -> str:
        pip = ""
        if self.package is not None:
            extra = f" (the extra {self.package['extra']})" if "extra" in self.package else ""
            pip = f"`pip install {self.package['requirement']}`{extra} or "
        return f"{pip}backbone.path=DIR (a folder with the files of {self.hub})"


def _lacking(folder: Path, needs: Sequence[Alternatives]) -> list[str]:
    """What of the needed files is not in the folder, in words."""
    return [
        " or ".join(" + ".join(files) for files in need)
        for need in needs
        if not any(all((folder / name).is_file() for name in files) for files in need)
    ]


def _complete_folder(path: str, needs: Sequence[Alternatives]) -> Path:
    folder = given_path("backbone.path", path)
    if not folder.is_dir():
        raise UserError(f"backbone.path={path}: there is no such folder")
    lacking = _lacking(folder, needs)
    if lacking:
        raise UserError(f"backbone.path={path} lacks {', '.join(lacking)}")
    return folder


def _cached(hub: str, revision: str | None, needs: Sequence[Alternatives]) -> Path | None:
    """The snapshot in the hub's local cache, if it holds all that is needed; asks no network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(hub, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise UserError(f"backbone.hub={hub}: {first_line(error)}") from error
    return None if _lacking(folder, needs) else folder


def _first_offered(need: Alternatives, offered: set[str]) -> Sequence[str]:
    return next((files for files in need if offered.issuperset(files)), ())


# other people's loaders


@contextmanager
def readable(folder: Path, what: str) -> Iterator[None]:
    """Turn what the loaders raise over a broken file into a UserError."""
    try:
        yield
    # safetensors, pickle, protobuf, tokenizers and transformers each raise their own, with no common class
    except Exception as error:
        raise UserError(f"cannot read the {what} in {folder}: {first_line(error)}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' load report and progress bars off the screen; errors still come as exceptions."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
