"""The plan of a sweep: which runs a file of configs/sweep describes, what each needs, and where each lies.

A sweep file says what runs there are:

    common:   overrides of every run
    where:    overrides of the runs that have an override, e.g. `method=lora: {method.dropout: 0.0}`, or several,
              `method=lora task=rte: {...}`; the last match decides
    runs:     blocks of override -> value or list of values; a block is their product, its first key slowest;
              a block overrides common and where

A value may depend on other runs, which then run first:

    {best_of: [VALUES], split: SPLIT, seed: K}    the value whose run with seed K ended best on that split;
                                               seed: [K, L] takes the mean over several seeds
    {run_with: {OVERRIDE: VALUE}}              the directory of the same run with other overrides
"""

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from increlora import result_files
from increlora.errors import UserError
from increlora.glue import config, identity, results

CONFIGS = config.CONFIGS
SWEEPS = CONFIGS / "sweep"
NUMBER = r"0|[1-9]\d*"
ANY_SEED = 987654321  # stands for the seed in a configuration that serves all seeds
PLACES = ("task.data_dir", "task.folder", "backbone.path")  # no part of what a run is called
REFUSED = {
    "overwrite": "a sweep does not run again what is finished; delete the directories of the runs that it shall repeat",
    "run_dir": "every run of a sweep has a directory of its own; start the sweep in the folder where they should be",
}


@dataclass
class Run:
    """One run of the sweep: its overrides, the runs that they depend on by override, and its state."""

    settings: dict[str, Any]
    sources: dict[str, list["Run"]] = field(default_factory=dict)
    state: str = "waiting"  # finished, failed, stopped, not begun
    overrides: list[str] = field(default_factory=list)  # once everything it needs is finished
    directory: Path = Path()
    result: Any = None  # the content of its result file, once it is finished
    error: str = ""  # why it cannot begin
    tries: int = 0
    future: Any = None  # of Parsl, once it is submitted

    @property
    def name(self) -> str:
        """What distinguishes it from the other runs, in words."""
        told = {
            key: self.settings.get(key) for key in ("task", "method", "budget", "experiment", "train.learning_rate")
        }
        words = [str(value) for value in told.values() if value is not None and not isinstance(value, dict)]
        return " ".join([*words, f"seed {self.settings.get('seed', 'by default')}"])

    @property
    def needs(self) -> list["Run"]:
        """The runs that must finish first."""
        return [run for runs in self.sources.values() for run in runs]

    @property
    def log(self) -> Path:
        return self.directory / "sweep.log"


# the file


def read_sweep(name: str) -> dict[str, Any]:
    """A file of configs/sweep, or of another folder.

    Raises:
        UserError: there is no file of that name, or it is not a sweep.
    """
    path = Path(name) if name.endswith(".yaml") else SWEEPS / f"{name}.yaml"
    if not path.exists():
        there = ", ".join(sorted(other.stem for other in SWEEPS.glob("*.yaml")))
        raise UserError(f"there is no sweep '{name}'; there is: {there}")
    try:
        sweep = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(sweep, dict) or not {"about", "runs"} <= set(sweep) <= {"about", "common", "where", "runs"}:
        has = ", ".join(map(str, sweep))
        raise UserError(f"{path} has {has}; a sweep has about, runs and perhaps common and where")
    check(sweep, path)
    return sweep


def check(sweep: Mapping[str, Any], path: Path) -> None:
    """Whether the parts of a sweep are what `expand` takes them for.

    Raises:
        UserError: one is not, with the file.
    """
    blocks, common, conditions = sweep["runs"], sweep.get("common", {}), sweep.get("where", {})
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        raise UserError(f"{path}: runs is not a list of blocks of override: value, e.g. `- {{task: rte, seed: [1]}}`")
    parts = {"common": common, "where": conditions}
    if isinstance(conditions, dict):
        parts |= {f"where {condition}": overrides for condition, overrides in conditions.items()}
    for name, part in parts.items():
        if not isinstance(part, dict):
            raise UserError(f"{path}: {name} is not a mapping of override: value, e.g. `{{budget: r2}}`")
    for part in (common, *conditions.values(), *blocks):
        for key, written in part.items():
            for value in listed(written):
                if isinstance(value, dict) and not dependent(value):
                    raise UserError(
                        f"{path}, {key}: a value that depends on other runs is {{best_of: [VALUES], split: SPLIT, "
                        f"seed: K}} or {{run_with: {{OVERRIDE: VALUE}}}}, not {value}"
                    )
    refuse_idle_conditions(path, common, conditions, blocks)


def dependent(value: Mapping[str, Any]) -> bool:
    """Whether a value says which other runs it depends on."""
    if set(value) == {"best_of", "split", "seed"}:
        return isinstance(value["best_of"], list) and bool(value["best_of"]) and value["seed"] != []
    return set(value) == {"run_with"} and isinstance(value["run_with"], dict)


def parted(sweep: Mapping[str, Any], overrides: Sequence[str]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The overrides that choose among the sweep's values, and those that go to every run.

    Raises:
        UserError: a word that is not an override, or a value that the sweep does not have.
    """
    varied: dict[str, set[str]] = {}
    for block in sweep["runs"]:
        for key, value in block.items():
            varied.setdefault(key, set()).update(map(str, listed(value)))
    chosen, extra = {}, {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"'{override}' is not an override; write key=value")
        if key not in varied:
            extra[key] = value
            continue
        chosen[key] = value.split(",")
        if unknown := set(chosen[key]) - varied[key]:
            there = ", ".join(sorted(varied[key]))
            raise UserError(f"{key}={','.join(sorted(unknown))}: the sweep has {key} {there}")
    return chosen, extra


# its runs


# what runs there are


def expand(sweep: Mapping[str, Any], chosen: Mapping[str, list[str]], extra: Mapping[str, str]) -> list[Run]:
    """Every run, each after those that it needs.

    Args:
        sweep: content of a sweep file.
        chosen: override -> the values to keep.
        extra: overrides of every run.

    Raises:
        UserError: an override that no run of a sweep can have (`REFUSED`).
    """
    runs: dict[str, Run] = {}

    def add(own: dict[str, Any]) -> Run:
        given = {key: value for key, value in extra.items() if not (key == "seed" and "seed" in own)}  # as trials have
        settings = {**sweep.get("common", {}), **where(sweep, {**own, **given}), **own, **given}
        for name, value in settings.items():
            if reason := REFUSED.get(str(name).lstrip("+~")):
                raise UserError(f"{name}={value}: {reason}")
        key = json.dumps(counted(settings), sort_keys=True)
        if key not in runs:
            undecided = {name: value for name, value in settings.items() if isinstance(value, dict)}
            sources = {name: [add(other) for other in needed(own, name, value)] for name, value in undecided.items()}
            runs[key] = Run(settings, sources)
        if apart := [
            f"{name}={settings[name]}" for name in PLACES if settings.get(name) != runs[key].settings.get(name)
        ]:
            raise UserError(
                f"{apart[0]}: a run with other values of it has the same directory, so one of them would be left out; "
                "give each a task (or a backbone) of its own, or a sweep in a folder of its own"
            )
        return runs[key]

    for block in sweep["runs"]:
        for settings in product(block):
            if all(str(settings[key]) in values for key, values in chosen.items() if key in settings):
                add(settings)
    return list(runs.values())


def counted(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are part of what a run is."""
    return {name: value for name, value in settings.items() if identity.counts(str(name).lstrip("+~"))}


def product(block: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """All combinations of the values of a block."""
    values = map(listed, block.values())
    return (dict(zip(block, combination, strict=True)) for combination in itertools.product(*values))


def where(sweep: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The overrides that the sweep gives to runs with these settings."""
    settings = {**sweep.get("common", {}), **settings}
    matching = (
        overrides
        for condition, overrides in sweep.get("where", {}).items()
        if all(is_value(settings.get(key), word) for key, word in parts_of(condition))
    )
    return {key: value for overrides in matching for key, value in overrides.items()}


def parts_of(condition: str) -> list[tuple[str, str]]:
    """The keys and words of a condition, `task=rte method=lora`."""
    return [(key, word) for key, _, word in (part.partition("=") for part in condition.split())]


def is_value(value: Any, word: str) -> bool:
    """Whether a word of a condition is this value: as text, as a number, or as true, false or null."""
    if str(value) == word:
        return True
    try:
        return float(word) == value and not isinstance(value, bool)
    except ValueError:
        return value is config.WORDS.get(word.lower(), word)


def refuse_idle_conditions(path: Path, common: Mapping[str, Any], conditions: Iterable[str], blocks: Any) -> None:
    """Return if every part of a condition is a value that some run of the sweep has from the start.

    Raises:
        UserError: no run has it, or trials choose it.
    """
    blocks = [common, *blocks]
    for block in blocks:  # those of the runs that these need come to the end
        for value in itertools.chain.from_iterable(map(listed, block.values())):
            if isinstance(value, dict):
                blocks += [value["run_with"]] if "run_with" in value else [{"seed": value["seed"]}]
    for condition in conditions:
        for key, word in parts_of(condition):
            if any(isinstance(value, dict) and "best_of" in value for b in blocks for value in listed(b.get(key, []))):
                raise UserError(
                    f"{path}: the condition '{condition}' is about {key}, which trials choose (best_of), so the run "
                    "that follows them could not have its overrides"
                )
            if not any(is_value(value, word) for block in blocks for value in alternatives(block.get(key, []))):
                raise UserError(
                    f"{path}: the condition '{condition}' holds for no run of the sweep, which has no {key}={word}; "
                    "several parts stand apart by blanks"
                )


def listed(value: Any) -> list[Any]:
    """A value of a block as the list of values that it stands for."""
    return value if isinstance(value, list) else [value]


def alternatives(value: Any) -> list[Any]:
    """The same, with the candidates of a `best_of` in its place."""
    found = (item.get("best_of", []) if isinstance(item, dict) else [item] for item in listed(value))
    return list(itertools.chain.from_iterable(found))


def needed(own: Mapping[str, Any], name: str, value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The runs that the value of an override depends on, as a block would describe them.

    Args:
        own: the same of the run that has the value.
    """
    if "best_of" in value:
        return [{**own, name: candidate, "seed": k} for candidate in value["best_of"] for k in trial_seeds(value)]
    return [{**{key: own[key] for key in own if key != name}, **value["run_with"]}]


def trial_seeds(value: Mapping[str, Any]) -> list[int]:
    """The seeds whose runs choose a value."""
    return listed(value["seed"])


def resolve(run: Run) -> None:
    """Work out overrides and directory of a run whose needs are finished.

    Raises:
        UserError: Hydra cannot compose it, or another run with these keys and this method.
    """
    values = {name: final(run, name) if name in run.sources else value for name, value in run.settings.items()}
    run.overrides = [f"{key}={quoted(value)}" for key, value in values.items()]
    check_keys(values, run.overrides)
    run.directory = directory(run.overrides)


# Composing takes a tenth of a second, and a sweep may have ten thousand runs. So a composition serves all runs that it
# holds for: what a run is called depends on few overrides, and the seed is only copied to where it is used.


CHECKED: set[tuple] = set()


def check_keys(values: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Compose one run of every method and set of keys, so that a wrong key is told before anything runs."""
    told = (*(str(values.get(key)) for key in ("method", "experiment", "compat", "recipe")), frozenset(values))
    if told not in CHECKED:
        config.load(overrides)
        CHECKED.add(told)


@functools.cache
def _names(overrides: tuple[str, ...]) -> dict[str, Any]:
    """The names by which a run is known, where no override gives them."""
    cfg = config.load(overrides)
    return {**{group: cfg[group].name for group in config.GROUPS}, "seed": cfg.seed}


def directory(overrides: Sequence[str]) -> Path:
    """Where a run with these overrides lies, as `config.run_directory` says."""
    given = dict(override.split("=", 1) for override in config.spelled(overrides) if "=" in override)
    by_name = {
        group: given[group] for group in config.GROUPS if (CONFIGS / group / f"{given.get(group)}.yaml").exists()
    }
    others = tuple(f"{key}={given[key]}" for key in ("experiment", "compat") if key in given)
    seed = given.get("seed", "")
    if "run_dir" in given or set(config.GROUPS) & set(given) - set(by_name) or not re.fullmatch(NUMBER, seed or "0"):
        cfg = config.load(overrides)
        return config.run_directory(cfg, config.identity(cfg, overrides))
    names = {**_names(others), **by_name} | ({"seed": int(seed)} if seed else {})
    return config.directory_of({**names, "overrides": config.counted_overrides(overrides)})


@functools.cache
def _resolved(overrides: tuple[str, ...]) -> tuple[dict[str, Any], Any]:
    """The plain configuration of runs that differ in the seed alone, and the composed one."""
    cfg = config.load([*overrides, f"seed={ANY_SEED}"])
    return json.loads(json.dumps(config.resolved(cfg))), cfg


@functools.cache
def _inputs(overrides: tuple[str, ...]) -> dict[str, str]:
    return config.inputs(_resolved(overrides)[1])


def with_seed(node: Any, seed: int) -> Any:
    """A configuration with the seed in the place of `ANY_SEED`."""
    if isinstance(node, dict):
        return {key: with_seed(value, seed) for key, value in node.items()}
    if isinstance(node, list):
        return [with_seed(value, seed) for value in node]
    if isinstance(node, str):
        return node.replace(str(ANY_SEED), str(seed))
    return seed if node == ANY_SEED and isinstance(node, int) else node


def resolved(overrides: Sequence[str]) -> tuple[dict[str, Any], Callable[[], dict[str, str]]]:
    """The plain configuration of a run, as `config.resolved` gives it, and what gives the digests of what it reads."""
    seeds = [override.partition("=")[2] for override in overrides if override.startswith("seed=")]
    if len(seeds) != 1 or not re.fullmatch(NUMBER, seeds[0]):
        cfg = config.load(overrides)
        return json.loads(json.dumps(config.resolved(cfg))), lambda: config.inputs(cfg)
    others = tuple(override for override in overrides if not override.startswith("seed="))
    return with_seed(_resolved(others)[0], int(seeds[0])), lambda: _inputs(others)


def final(run: Run, name: str) -> Any:
    """The value of an override that depends on other runs."""
    value, sources = run.settings[name], run.sources[name]
    if "run_with" in value:
        if sources[0].result is not None and not (sources[0].directory / result_files.FILE_NAME).exists():
            raise UserError(
                f"{run.name} needs the run directory {sources[0].directory}; the result known elsewhere is not enough, "
                "so run it here, or copy the result there"
            )
        return sources[0].directory
    scores: dict[Any, list[float]] = {candidate: [] for candidate in value["best_of"]}
    for trial in sources:
        scores[trial.settings[name]].append(result_files.last_score(trial.result, value["split"]))
    means = result_files.trial_means(scores)
    return max(means, key=means.__getitem__)  # the first of equals


def quoted(value: Any) -> str:
    """A value as Hydra reads it."""
    if value is None:
        return "null"
    text = str(value)
    if re.fullmatch(r"[\w./:+%|-]*", text, re.ASCII):
        return text
    return "'{}'".format(re.sub(r"(\\*)(?='|$)", r"\1\1", text).replace("'", r"\'"))


def find_result(run: Run, known: Path | None) -> dict[str, Any] | None:
    """What a sweep needs of the result of a run that finished before, in its own directory or among the known ones.

    Raises:
        UserError: in its directory lies something else, or the result of another run.
    """
    if known is None and not (run.directory / result_files.FILE_NAME).exists():
        return None
    configuration, inputs = resolved(run.overrides)
    result = results.stored(run.directory, configuration, inputs)
    if result is not None:
        return {part: result[part] for part in ("status", "scores", "curve", "cost")}  # there may be ten thousand
    if known is None:
        return None
    names = {key: configuration[key]["name"] for key in config.GROUPS} | {"seed": configuration["seed"]}
    for found in known_results(known).get(tuple(names[key] for key in identity.KEYS), []):
        same = not identity.differences(found["config"], configuration)
        if same and not results.changed_inputs(found, inputs()):
            return found
    return None


@functools.cache
def known_results(folder: Path) -> dict[tuple, list[dict[str, Any]]]:
    """The results below a folder by what they are: it does not matter where they lie."""
    found: dict[tuple, list[dict[str, Any]]] = {}
    for result in result_files.load_runs(folder, without=("allocations", "ranks", "parameters")):
        found.setdefault(tuple(result["run"][key] for key in identity.KEYS), []).append(result)
    return found
