"""From the command line to objects: compose, name the run, build; errors in two lines.

Of the library only `finished_run` needs this module, and none of it Hydra itself; `run.py` and the scripts do.
"""

import functools
import hashlib
import itertools
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, OverrideParseException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from increlora.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
WANTS_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"
IDENTITY = ("backbone", "budget", "method", "task", "seed")
# change where a run lies, what it shows or where it computes, not what it is
NEUTRAL = (
    "tracker", "run_dir", "overwrite", "device", "hydra", "backbone.path", "task.data_dir",
    "train.progress", "train.log_interval", "train.checkpoint_interval",
)  # fmt: skip


def load(overrides: Sequence[str]) -> DictConfig:
    """Compose the configuration as `run.py` does.

    Raises:
        UserError: an unknown group, choice or key.
    """
    with readable_errors(), initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def build(node: DictConfig) -> Any:
    """The object that a node with `_target_` describes.

    Raises:
        UserError: a key that the class does not have, or a value that it refuses.
    """
    with readable_errors(str(node._key())):
        return instantiate(node, _convert_="all")


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """Plain data without the keys that do not change what a run is (`NEUTRAL`)."""
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
    """What a run is: backbone, budget, method, task, seed, recipe and every other override."""
    names = {group: cfg[group].name for group in ("backbone", "budget", "method", "task")}
    recipe = "{method}/{budget}/{task}".format(**names)
    exists = (CONFIGS / "recipe" / f"{recipe}.yaml").exists()
    return {
        **names,
        "seed": cfg.seed,
        "recipe": recipe if exists else None,
        "settings_from": cfg.settings_from,
        "overrides": sorted(o for o in overrides if not _is(o, IDENTITY) and not _is(o, NEUTRAL)),
    }


def inputs(cfg: DictConfig) -> dict[str, str | None]:
    """Digests of the local files that a run reads and that its configuration only points to, by name.

    Data from the hub and generated data are not among them: a fixed revision, or the configuration, says what they are.

    Raises:
        UserError: such a file is missing or cannot be read.
    """
    found: dict[str, str | None] = {}
    if cfg.task.get("data_dir"):
        found["data"] = _data_digest(_node(cfg.task))
    if cfg.backbone.get("path") or cfg.backbone.get("sha256"):
        found["base"] = _base_digest(_node(cfg.backbone))
    if cfg.method.get("pattern"):
        found |= build(cfg.method).inputs()
    return found


def _node(cfg: DictConfig) -> str:
    node: Any = OmegaConf.to_container(cfg, resolve=True)
    return json.dumps({key: value for key, value in node.items() if key != "seed"})


@functools.cache  # a sweep asks for every one of its runs
def _data_digest(node: str) -> str:
    from increlora.glue.tasks import fingerprint

    return fingerprint(build(OmegaConf.create(json.loads(node))).read()[1])


@functools.cache
def _base_digest(node: str) -> str | None:
    return build(OmegaConf.create(json.loads(node))).digest()


def read_study(name: str) -> dict[str, Any]:
    """What a file of configs/study says.

    Raises:
        UserError: there is none of that name.
    """
    path = CONFIGS / "study" / f"{name}.yaml"
    if not path.exists():
        there = ", ".join(sorted(other.stem for other in path.parent.glob("*.yaml")))
        raise UserError(f"there is no study '{name}'; there is: {there}")
    content: Any = OmegaConf.to_container(OmegaConf.load(path))
    return content


def run_directory(cfg: DictConfig, run: Mapping[str, Any]) -> Path:
    """`run_dir`, or the directory that says what the run is."""
    if cfg.run_dir:
        return Path(cfg.run_dir).expanduser()
    path = Path("runs", *(run[key] for key in ("backbone", "budget", "method", "task")))
    if run["overrides"]:
        path /= _folder_name(run["overrides"])
    return path / f"seed{run['seed']}"


def _is(override: str, keys: Sequence[str]) -> bool:
    name = override.lstrip("+~").partition("=")[0]
    return any(name == key or (key in NEUTRAL and name.startswith(f"{key}.")) for key in keys)


def _folder_name(overrides: Sequence[str]) -> str:
    text = ",".join(overrides)
    name = re.sub(r"[^\w.,=+-]", "_", text)
    if name == text and len(name) <= 120:
        return name
    return f"{name[:100]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


class readable_errors:
    """Turn what Hydra and OmegaConf raise into a UserError of one or two lines.

    Args:
        group: of the configuration, whose object is being built.
    """

    def __init__(self, group: str = ""):
        self.group = group

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (HydraException, OmegaConfBaseException)):
            cause = error
            while cause is not None:  # instantiate() wraps what the constructor raised
                if isinstance(cause, UserError):
                    raise cause from None
                if isinstance(cause, OverrideParseException):
                    raise UserError(
                        f"'{cause.override}' cannot be read: a value that holds = , ( ) ~ or blanks needs quotes, "
                        """e.g. "run_dir='a=b'" (the outer ones for the shell)"""
                    ) from error
                cause = cause.__cause__
            raise UserError(_two_lines(str(error), self.group)) from error


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
    """Print an error of the person at the keyboard in two lines and leave with exit code 2.

    Wrap both the function that Hydra calls and Hydra's own entry point, which raises what is wrong with
    the overrides. Set HYDRA_FULL_ERROR=1 to see the traceback.
    """

    @functools.wraps(main)
    def call(*arguments: Any, **keywords: Any) -> Any:
        before = os.environ.get("HYDRA_FULL_ERROR", "0")
        os.environ["HYDRA_FULL_ERROR"] = "1"  # lets Hydra raise what is wrong instead of printing pages
        try:
            with readable_errors():
                return main(*arguments, **keywords)
        except UserError as error:
            if WANTS_TRACEBACK:
                raise
            print(f"error: {error}", file=sys.stderr)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:  # before or after training, where there is nothing to keep
            sys.exit(128 + signal.SIGINT)
        finally:
            os.environ["HYDRA_FULL_ERROR"] = before

    return call
