"""From the command line to objects: compose, name the run, build; errors in two lines.

In the library only `finished_run` uses this module; otherwise `run.py` and the scripts do.
"""

import contextlib
import errno
import functools
import hashlib
import itertools
import json
import os
import re
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.conf import HydraConf
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from increlora.errors import Interrupted, UserError
from increlora.files import given_path, shown
from increlora.glue.identity import CLASS, KEYS, NEUTRAL, counts
from increlora.glue.identity import inputs as inputs_of

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
WANTS_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"
WORDS = {"true": True, "false": False, "null": None}  # what these mean in an override
GROUPS = ("backbone", "budget", "method", "task")  # what has a name, by which results and directories are known


def load(overrides: Sequence[str]) -> DictConfig:
    """Compose the configuration as `run.py` does.

    Raises:
        UserError: an unknown group, choice or key.
    """
    with readable_errors(), initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("config", overrides=spelled(overrides), return_hydra_config=True)
        return recorded(cfg, cfg.hydra)


def spelled(overrides: Sequence[str]) -> list[str]:
    """Overrides as Hydra takes them: it has no null for a group, so what chooses nothing is left out, or deletes."""
    nothing = re.compile("(experiment|compat)=null", re.IGNORECASE)
    return ["~recipe" if o.lower() == "recipe=null" else o for o in overrides if not nothing.fullmatch(o)]


def recorded(cfg: DictConfig, hydra: DictConfig) -> DictConfig:
    """The configuration with the recipe that Hydra composed, None if none, under `hydra.recipe`.

    Args:
        hydra: what Hydra says of this composition (`HydraConfig.get()`).

    Raises:
        UserError: a recipe was asked for that does not exist; a class or a name that would give its results the name
            of another.
    """
    choices, overrides = hydra.runtime.choices, list(hydra.overrides.task)
    _refuse_borrowed_names(cfg, choices, overrides)
    asked = [override for override in overrides if _key(override) == "recipe" and not override.startswith("~")]
    if asked and "recipe" not in choices:
        raise UserError(f"'{asked[-1]}' is not the name of one recipe, e.g. recipe=increlora/r2/rte")
    if not isinstance(cfg.get("overwrite", False), bool):
        raise UserError(f"overwrite={cfg.overwrite} must be true or false; true deletes the result that is there")
    recipe = choices.get("recipe") or None
    folders = [Path(source.path) for source in hydra.runtime.config_sources if source.schema == "file"]
    if recipe and not any((folder / "recipe" / f"{recipe}.yaml").is_file() for folder in folders):
        by_default = "{method}/{budget}/{task}".format(**choices)  # which is optional: Hydra passes it over
        if asked or recipe != by_default:
            raise UserError(f"there is no recipe '{recipe}' in configs/recipe; recipe=null composes none")
        recipe = None
    with flag_override(cfg, ["struct", "readonly"], False):
        cfg.hydra = {"recipe": recipe}
    return cfg


def _refuse_borrowed_names(cfg: DictConfig, choices: Mapping[str, str], overrides: Sequence[str]) -> None:
    """Results are known by names and not by classes, so two choices must not have the same name."""
    for key in map(_key, overrides):
        if key.rpartition(".")[2] == CLASS:
            raise UserError(
                f"{key} is no part of what a run is, so its results would pass for those of another class: "
                f"write a file of configs/{key.partition('.')[0]} with this class and a name of its own"
            )
    for group in GROUPS:
        choice = choices.get(group)
        if group in cfg and cfg[group].get("name") != choice:
            raise UserError(
                f"{group}={choice} has the name '{cfg[group].get('name')}', by which its results would be known; "
                f"it must be that of its file: name: {choice}"
            )


def build(node: DictConfig) -> Any:
    """The object that a node with `_target_` describes.

    Raises:
        UserError: a key that the class does not have, or a value that it refuses.
    """
    with readable_errors(node):
        return instantiate(node, _convert_="all")


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """Plain data without the keys that say where a run lies and what it shows (`identity.NEUTRAL`)."""
    with readable_errors():
        config = OmegaConf.to_container(cfg, resolve=True)
    for key in NEUTRAL:
        *parents, leaf = key.split(".")
        node = config
        for parent in parents:
            node = node.get(parent) or {}
        node.pop(leaf, None)
    return config


def identity(cfg: DictConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """What a run is: backbone, budget, method, task, seed, recipe and every other override that counts."""
    return {
        **{group: cfg[group].name for group in GROUPS},
        "seed": cfg.seed,
        "recipe": cfg.hydra.recipe,
        "settings_from": cfg.settings_from,
        "overrides": counted_overrides(overrides),
    }


def counted_overrides(overrides: Sequence[str]) -> list[str]:
    """The overrides that make a run another one, beside the keys that name it; of one key the last, which decides."""
    last = {_key(o): "recipe=null" if o == "~recipe" else o for o in spelled(overrides)}  # no ~ in a folder's name
    return sorted(o for key, o in last.items() if key not in KEYS and counts(key))


def inputs(cfg: DictConfig) -> dict[str, str]:
    """Digests of the local files that a run of this configuration would read now, by name.

    Raises:
        UserError: such a file is missing or cannot be read.
    """
    node: Any = OmegaConf.to_container(cfg.task, resolve=True)
    node.pop("seed", None)  # no file depends on it
    return inputs_of(_task(json.dumps(node)), build(cfg.backbone), build(cfg.method))


@functools.cache  # which reads its files once, though a sweep asks for every one of its runs
def _task(node: str) -> Any:
    return build(OmegaConf.create({"task": json.loads(node)}).task)


def read_study(name: str) -> dict[str, Any]:
    """The content of a file of configs/study.

    Raises:
        UserError: there is no file of that name.
    """
    path = CONFIGS / "study" / f"{name}.yaml"
    if not path.exists():
        there = ", ".join(sorted(other.stem for other in path.parent.glob("*.yaml")))
        raise UserError(f"there is no study '{name}'; there is: {there}")
    content: Any = OmegaConf.to_container(OmegaConf.load(path))
    return content


def run_directory(cfg: DictConfig, run: Mapping[str, Any]) -> Path:
    """`run_dir`, or else the directory named by what the run is."""
    if cfg.run_dir:
        return given_path("run_dir", cfg.run_dir)
    return directory_of(run)


def directory_of(run: Mapping[str, Any]) -> Path:
    """The directory that what a run is gives it."""
    path = Path("runs", *(run[key] for key in ("backbone", "budget", "method", "task")))
    if run["overrides"]:
        path /= _folder_name(run["overrides"])
    return path / f"seed{run['seed']}"


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def _folder_name(overrides: Sequence[str]) -> str:
    text = ",".join(overrides)
    name = re.sub(r"[^\w.,=+-]", "_", text)
    if name == text and len(name) <= 120:
        return name
    return f"{name[:100]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


class readable_errors:
    """Turn what Hydra and OmegaConf raise into a UserError of one or two lines, which names keys of the configuration.

    The classes that a configuration describes name their own arguments, in backquotes: `top_h`. Here that becomes the
    key with the node's name before it: method.top_h.

    Args:
        node: of the configuration, whose object is being built or used.
    """

    def __init__(self, node: DictConfig | None = None):
        self.node = node

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, UserError):
            self._name_keys(error)
        elif isinstance(error, ValueError) and str(error).startswith("Config group override must be"):
            raise UserError("a group takes the name of one of its choices, e.g. task=rte; null is none") from error
        elif isinstance(error, (HydraException, OmegaConfBaseException)):
            cause: BaseException | None = error
            while cause is not None:  # instantiate() wraps what the constructor raised
                if isinstance(cause, UserError):
                    self._name_keys(cause)
                    raise cause from None
                if isinstance(cause, OverrideParseException):
                    raise UserError(
                        f"'{cause.override}' cannot be read: other characters than letters, digits and _./:+- "
                        """in a value need quotes, e.g. "run_dir='a=b'" (the outer ones for the shell)"""
                    ) from error
                cause = cause.__cause__
            raise UserError(_two_lines(str(error), self._group())) from error

    def _group(self) -> str:
        return "" if self.node is None else str(self.node._key())

    def _name_keys(self, error: UserError) -> None:
        if self.node is not None:
            error.args = (re.sub(r"`(\w+)`", self._key_of, str(error)),)

    def _key_of(self, argument: re.Match) -> str:
        name, node = argument[1], self.node
        if node is None or name not in node:
            return argument[0]
        raw: Any = OmegaConf.to_container(node, resolve=False)
        source = re.fullmatch(r"\$\{([\w.]+)\}", str(raw[name]))
        if source and isinstance(node[name], DictConfig):  # its entries can be set only where they are
            return source[1]
        return f"{self._group()}.{name}"


def _two_lines(text: str, group: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and lines[1].startswith("Available options"):
        options = itertools.takewhile(lambda line: not line.startswith("Config search path"), lines[2:])
        return f"{lines[0]}\nthere is: {', '.join(options)}"
    if lines[0].startswith("Could not override"):
        return f"{lines[0]}\n`python run.py --cfg job` shows every key."
    if match := re.search(r"call to target '(.*?)':.*unexpected keyword argument '(\w+)'", " ".join(lines)):
        return (
            f"{match[1]} has no key '{match[2]}'. `python run.py --cfg job` shows every key; "
            f"where an experiment or a recipe sets it, leave it out with ~{group}.{match[2]}"
        )
    return " ".join(lines[:2])


def guarded(main: Callable[..., Any]) -> Callable[..., Any]:
    """Print a user's error in two lines and leave with exit code 2.

    Where the reader of the output has left (`| head`), leave without a word, as a process does that the signal ends.
    Wrap both the function that Hydra calls and Hydra's own entry point, which raises what is wrong with
    the overrides. Set HYDRA_FULL_ERROR=1 to see the traceback.
    """

    @functools.wraps(main)
    def call(*arguments: Any, **keywords: Any) -> Any:
        if sys.flags.optimize > 1:
            print("error: python -OO removes docstrings, which transformers needs; leave -OO out", file=sys.stderr)
            sys.exit(UserError.exit_code)
        before = os.environ.get("HYDRA_FULL_ERROR", "0")
        os.environ["HYDRA_FULL_ERROR"] = "1"  # lets Hydra raise what is wrong instead of printing pages
        try:
            with readable_errors():
                returned = main(*arguments, **keywords)
            if sys.stdout:  # None: it was closed from the start
                sys.stdout.flush()  # here, not at the interpreter's end, where it could not be caught
            return returned
        except BrokenPipeError:
            if not _reader_has_left():
                raise
            sys.exit(128 + signal.SIGPIPE)
        except UserError as error:
            if WANTS_TRACEBACK:
                raise
            print("error:", "\n".join(shown(line, 2000) for line in str(error).splitlines()), file=sys.stderr)
            sys.exit(error.exit_code)
        except OSError as error:
            if WANTS_TRACEBACK or (error.filename is None and error.errno not in OF_OUTPUT):
                raise
            what = "an output" if error.filename is None else shown(str(error.filename))
            print(f"error: cannot use {what}: {error.strerror}", file=sys.stderr)
            if error.filename is None:  # what is still in it would raise again at the interpreter's end
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.exit(UserError.exit_code)
        except KeyboardInterrupt:  # before or after training, where there is nothing to keep
            sys.exit(128 + signal.SIGINT)
        finally:
            os.environ["HYDRA_FULL_ERROR"] = before

    return call


OF_OUTPUT = (errno.ENOSPC, errno.EBADF, errno.EIO)
FAILED: list[str] = []  # the jobs of this multirun that could not be done


@contextlib.contextmanager
def of_a_multirun(hydra: HydraConf) -> Iterator[None]:
    """In a multirun, an error ends its own job: it is printed, and the next job begins."""
    try:
        yield
    except Interrupted:
        raise
    except Exception as error:
        if hydra.mode != RunMode.MULTIRUN:
            raise
        FAILED.append(f"{hydra.job.num} ({' '.join(hydra.overrides.task)})")
        # of anything else than a user's error nobody wrote what to do
        said = str(error) if isinstance(error, UserError) else f"\n{traceback.format_exc()}"
        print(f"error in job {FAILED[-1]}: {said}", file=sys.stderr)


def failed_jobs() -> int:
    """Say which jobs of a multirun could not be done; returns the exit code."""
    if FAILED:
        print(f"error: {len(FAILED)} jobs of this multirun were not done: {', '.join(FAILED)}", file=sys.stderr)
        return UserError.exit_code
    return 0


def _reader_has_left() -> bool:
    """Whether nobody reads the standard output any more; what is still in it is then dropped."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)  # an error is told without being asked for
    left = any(event & select.POLLERR for _, event in output.poll(0))
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return left
