"""Checkpoints that survive a kill at any moment: one safetensors file each, written completely or not at all.

A file holds tensors and, in its header, one JSON document and a checksum of both. Nothing is pickled. The previous
file is kept until the new one is complete: write, fsync, rename.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from increlora import distributed
from increlora.errors import Busy, UserError, first_line
from increlora.files import parsed_json, writing
from increlora.glue.digest import sha256
from increlora.glue.identity import changed_since
from increlora.method import Method
from increlora.result_files import FILE_NAME, up_to_date

log = logging.getLogger(__name__)
FORMAT = 3  # 2: components lie in the bank; 3: with a checksum
READABLE = (2, FORMAT)
TENSOR = "tensor:"  # marks the place of a tensor in the JSON document
NUMBER = "number:"  # marks a number that is not finite, which JSON has no word for


# files


def write(path: Path, document: Mapping[str, Any], keep_previous: bool = False) -> None:
    """Write nested dicts and lists of JSON values and tensors to one file, atomically.

    Args:
        keep_previous: rename what was there to `previous-<name>` first.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    plain = json.loads(json.dumps(_without_tensors(document, tensors, ""), allow_nan=False))
    text = json.dumps({"format": FORMAT, "checksum": _checksum(plain, tensors), "document": plain})
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path, SafetensorError):
        temporary.unlink(missing_ok=True)  # it may be a link
        temporary.touch()
        rights = temporary.stat().st_mode  # as the umask wants it; safetensors makes all its files private
        save_file(tensors, temporary, metadata={"increlora": text})  # with several keys their order would be random
        temporary.chmod(rights)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        if keep_previous and path.exists():
            os.replace(path, previous(path))
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote.

    Raises:
        UserError: the file is truncated or damaged, is not a checkpoint, or has another format.
    """
    try:
        with safe_open(path, "pt") as file:
            header = parsed_json((file.metadata() or {})["increlora"])
            if header["format"] not in READABLE:
                raise UserError(
                    f"{path} is of checkpoint format {header['format']}, this version reads {FORMAT}: use the "
                    "version that wrote it, or run again with overwrite=true"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        document = header["document"]
        if (header["format"] > 2 or "checksum" in header) and header["checksum"] != _checksum(document, tensors):
            raise UserError(f"{path} is damaged: its content does not have its checksum")
        return _with_tensors(document, tensors)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is truncated or not a checkpoint ({first_line(error)})") from None


def _checksum(document: Any, tensors: Mapping[str, Tensor]) -> str:
    """sha256 (hex) over the JSON document, and over name, type, shape and bytes of every tensor."""
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _step(path: Path) -> int | None:
    """The step of kept weights, None where the file does not say it."""
    try:
        with safe_open(path, "pt") as file:
            return parsed_json((file.metadata() or {})["increlora"])["document"].get("step")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError):
        return None


def previous(path: Path) -> Path:
    """Where the file before this one is kept."""
    return path.with_name(f"previous-{path.name}")


def newest(path: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest complete checkpoint, None if there is none, and a sentence for each file that could not be used.

    Raises:
        UserError: there are checkpoints, but none is complete.
    """
    passed_over: list[str] = []
    for candidate in (path, previous(path)):
        if candidate.exists():
            try:
                return read(candidate), passed_over
            except UserError as error:
                passed_over.append(str(error))
    if passed_over:
        raise UserError(
            f"{passed_over[0]}, and there is no complete checkpoint before it.\nRun with overwrite=true to start again."
        )
    return None, []


LEFT = re.compile(  # temporary names: of `write`, of `files.replacing`, of safetensors
    r"\.((best|last|(previous-)?checkpoint)\.safetensors|result\.json|metrics\.jsonl)(\.\d+)?\.tmp|\.tmp\w{6}"
)


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Reserve a folder for this process until the end of the block, or of the process.

    Raises:
        UserError: another process holds it, or it cannot be made.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_others_files(folder)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Busy(f"another process is running in {folder}; wait for it or choose another run_dir") from None
        for left in folder.glob(".*"):  # by a process that was killed while it wrote
            if LEFT.fullmatch(left.name):
                left.unlink(missing_ok=True)
        yield
    finally:
        os.close(lock)  # the file stays: if it were deleted, a third process could lock a new file of the same name


def _refuse_others_files(folder: Path) -> None:
    """Return if what lies under our names is ours, and a file.

    Raises:
        UserError: something else would be overwritten, or waited for.
    """
    checkpoint, written = "checkpoint.safetensors", ("metrics.jsonl", "best.safetensors", "last.safetensors")
    there = [folder / name for name in (*written, checkpoint) if (folder / name).exists()]
    if odd := [path for path in there if not path.is_file()]:
        raise UserError(f"{odd[0]} is no regular file; move it away, or give another run_dir")
    if there and not any((folder / name).exists() for name in (".lock", FILE_NAME, checkpoint)):
        raise UserError(
            f"{folder} is no directory of a run, and its {there[0].name} would be overwritten: give another run_dir, "
            "or move the file away"
        )


def _without_tensors(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous().clone()  # clone: safetensors refuses shared memory
        return TENSOR + path
    if isinstance(value, Mapping):
        return {key: _without_tensors(item, tensors, f"{path}/{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_tensors(item, tensors, f"{path}/{i}") for i, item in enumerate(value)]
    return f"{NUMBER}{value}" if isinstance(value, float) and not math.isfinite(value) else value


def _with_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, str) and value.startswith(TENSOR):
        return tensors[value.removeprefix(TENSOR)]
    if isinstance(value, str) and value.startswith(NUMBER):
        return float(value.removeprefix(NUMBER))
    if isinstance(value, dict):
        return {key: _with_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_tensors(item, tensors) for item in value]
    return value


# the checkpoints of one run


@dataclass
class Checkpoints:
    """What a run keeps in its directory: `checkpoint`, the one before it, `best` and `last` weights.

    Args:
        folder: the run directory.
        identity: what must be the same for a run to be continued (`identity.of_checkpoint`).
        commits: of the code, in order; `load` puts those of the run so far before them.
        threads: of the processor, in the same way; another number rounds differently.
        machines: the name of the GPU, or CPU, in the same way.
    """

    folder: Path
    identity: Mapping[str, Any]
    commits: list[str] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    machines: list[str] = field(default_factory=list)
    best_step: int | None = field(default=None, init=False)  # of the weights kept as best

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def save(self, state: Mapping[str, Any]) -> None:
        """Write a checkpoint; the one before is kept.

        Raises:
            UserError: it cannot be written; the one before is still good.
        """
        document: dict[str, Any] = {
            "identity": self.identity, "commits": self.commits, "threads": self.threads, "machines": self.machines,
            "state": state,
        }  # fmt: skip
        if self.best_step is not None or not self.path("best").exists():  # else an earlier version kept them
            document["best_step"] = self.best_step
        write(self.path("checkpoint"), document, keep_previous=True)
        previous(self.path("best")).unlink(missing_ok=True)

    def load(self) -> dict[str, Any] | None:
        """The state to continue from, None if there is none.

        Raises:
            UserError: no checkpoint is complete, or it is of another configuration, other data or other processes.
        """
        document, passed_over = newest(self.path("checkpoint"))
        for sentence in passed_over:
            log.warning("%s; the previous checkpoint is complete and is used", sentence)
        if document is None:
            return None
        changed = changed_since(up_to_date(document["identity"]), json.loads(json.dumps(self.identity)))
        if changed:
            raise UserError(
                f"the checkpoint in {self.folder} is of another run: it differs in {', '.join(changed[:5])}.\n"
                "Give the arguments and the data it was started with, or overwrite=true to start again."
            )
        for name in ("commits", "threads", "machines"):
            setattr(self, name, list(dict.fromkeys([*document.get(name, []), *getattr(self, name)])))
        for sessions, change in (
            (self.threads, "had {} threads and goes on with {} (set OMP_NUM_THREADS)"),
            (self.machines, "had this processor: {}, and goes on with: {}"),
        ):
            if len(sessions) > 1:
                log.warning(
                    "this run %s; its numbers will differ in the last digits from a run without this change, "
                    "and the result says so",
                    change.format(*sessions[-2:]),
                )
        if "best_step" in document:
            self.best_step = document["best_step"]
            if distributed.is_main():
                self._restore_best()
        return document["state"]

    def _restore_best(self) -> None:
        """Go back to the best weights that the checkpoint knows: a killed session may have kept others after it."""
        path = self.path("best")
        for kept in (path, previous(path)):
            if kept.exists() and _step(kept) == self.best_step:
                os.replace(kept, path)
                break
        else:
            path.unlink(missing_ok=True)
        previous(path).unlink(missing_ok=True)

    def keep(self, name: str, state: Mapping[str, Any], step: int) -> None:
        """Write the trained weights and the method's structure after a step to `<name>.safetensors`.

        The best ones that the checkpoint knows stay beside it until the next checkpoint.
        """
        path = self.path(name)
        if name == "best":
            if path.exists() and not previous(path).exists():
                os.replace(path, previous(path))
            self.best_step = step
        write(path, {"identity": self.identity, "step": step, "state": state})

    def digests(self) -> dict[str, str]:
        """sha256 of the weights that are kept, by name."""
        return {name: sha256(self.path(name)) for name in ("best", "last") if self.path(name).exists()}

    def clear(self, *names: str) -> None:
        """Delete the checkpoints, and the weights kept under these names; others stay."""
        others = (self.path("checkpoint"), *(previous(self.path(name)) for name in ("checkpoint", "best")))
        for file in (*map(self.path, names), *others):
            file.unlink(missing_ok=True)


# the parts of a training run


def model_state(model: nn.Module, method: Method) -> dict[str, Any]:
    """Structure and weights: what turns the pretrained model into the trained one."""
    return {"method": method.state_dict(), "weights": method.trained_state(model)}


def load_model_state(model: nn.Module, method: Method, state: Mapping[str, Any]) -> None:
    """Structure first, then weights by name, on a prepared model.

    Raises:
        UserError: the weights do not fit the model.
    """
    method.load_state_dict(state["method"])
    current = model.state_dict(keep_vars=True)
    misfits = [n for n, t in state["weights"].items() if n not in current or current[n].shape != t.shape]
    misfits += [name for name in method.trained_state(model) if name not in state["weights"]]
    if misfits:
        raise UserError(
            f"the checkpoint is of another model: {len(misfits)} tensors do not fit or are absent, e.g. {misfits[0]}"
        )
    with torch.no_grad():
        for name, tensor in state["weights"].items():
            current[name].copy_(tensor)


def random_state() -> dict[str, Any]:
    """The states of every global random generator: torch on CPU and GPU, Python, numpy."""
    legacy: Any = numpy.random.get_state()  # a tuple, unless asked otherwise
    name, keys, position, has_gauss, cached = legacy
    version, internal, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(numpy.int64)), position, has_gauss, cached],
    }
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {})


def load_random_state(state: Mapping[str, Any]) -> None:
    """Set every global random generator."""
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    numpy.random.set_state((name, keys.numpy().astype(numpy.uint32), *rest))
