"""Run a sweep: one process per run, what is finished is not run again, what was cut off goes on.

    python scripts/sweep.py NAME [overrides] [--jobs N] [--known DIR] [--dry-run]

NAME is a file of configs/sweep, or a path to a YAML file, which says what runs there are:

    common:   overrides of every run
    where:    overrides of the runs that have an override, e.g. `method=lora: {method.dropout: 0.0}`
    runs:     blocks of override -> value or list of values; a block is their product, its first key slowest

A value may depend on other runs, which then run first:

    {best_of: [VALUES], split: SPLIT, seed: K}    the value whose run with seed K ended best on that split
    {run_with: {OVERRIDE: VALUE}}              the directory of the same run with other overrides

An override on the command line of a key that the sweep varies keeps only those values (`task=cola,stsb`); any
other goes to every run (`task.data_dir=GLUE`). Ctrl-C stops the runs, which keep what they have. Runs lie in
the current directory; what a run prints is in its sweep.log.
"""

import argparse
import ctypes
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.live import Live
from rich.table import Table

from increlora import result_files
from increlora.errors import UserError
from increlora.glue import config, results

RUN = Path(__file__).resolve().parent.parent / "run.py"
SWEEPS = config.CONFIGS / "sweep"
TRIES = 2
SHOWN = 12  # rows of the live table
REFUSED = {
    "overwrite": "a sweep does not run again what is finished; delete the directories of the runs that it shall repeat",
    "run_dir": "every run of a sweep has a directory of its own; start the sweep in the folder where they shall lie",
}


@dataclass
class Run:
    """One run of the sweep: its overrides, the runs that they depend on, and where it stands."""

    settings: dict[str, Any]
    needs: list["Run"] = field(default_factory=list)
    state: str = "waiting"  # running, finished, failed, stopped
    overrides: list[str] = field(default_factory=list)  # once everything it needs is finished
    directory: Path = Path()
    result: dict[str, Any] | None = None
    tries: int = 0
    process: subprocess.Popen | None = None
    gpu: str | None = None
    began: float = 0.0

    @property
    def name(self) -> str:
        """What tells it from the other runs, in words."""
        told = {
            key: self.settings.get(key) for key in ("task", "method", "budget", "experiment", "train.learning_rate")
        }
        words = [str(value) for value in told.values() if value is not None and not isinstance(value, dict)]
        return " ".join([*words, f"seed {self.settings.get('seed', 'by default')}"])

    @property
    def log(self) -> Path:
        return self.directory / "sweep.log"


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

    def add(settings: dict[str, Any]) -> Run:
        for name, value in settings.items():
            if reason := REFUSED.get(str(name).lstrip("+~")):
                raise UserError(f"{name}={value}: {reason}")
        key = json.dumps(settings, sort_keys=True)
        if key not in runs:
            needs = [add(other) for value in settings.values() for other in needed(settings, value)]
            runs[key] = Run(settings, needs)
        return runs[key]

    for block in sweep["runs"]:
        for settings in product(block):
            if all(str(settings[key]) in values for key, values in chosen.items() if key in settings):
                add({**sweep.get("common", {}), **settings, **where(sweep, settings), **extra})
    return list(runs.values())


def product(block: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """All combinations of the values of a block."""
    values = [value if isinstance(value, list) else [value] for value in block.values()]
    return (dict(zip(block, combination, strict=True)) for combination in itertools.product(*values))


def where(sweep: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The overrides that the sweep gives to runs with these settings."""
    settings = {**sweep.get("common", {}), **settings}
    matching = (
        overrides
        for condition, overrides in sweep.get("where", {}).items()
        if str(settings.get(condition.partition("=")[0])) == condition.partition("=")[2]
    )
    return {key: value for overrides in matching for key, value in overrides.items()}


def needed(settings: Mapping[str, Any], value: Any) -> list[dict[str, Any]]:
    """The settings of the runs that a value depends on."""
    if not isinstance(value, dict):
        return []
    key = next(key for key, other in settings.items() if other is value)
    if "best_of" in value:
        return [{**settings, key: candidate, "seed": value["seed"]} for candidate in value["best_of"]]
    own = {name for name in settings if name != key}
    return [{**{name: settings[name] for name in own}, **value["run_with"]}]


def resolve(run: Run) -> None:
    """Work out overrides and directory of a run whose needs are finished."""
    values = {key: final(value, run) if isinstance(value, dict) else value for key, value in run.settings.items()}
    run.overrides = [f"{key}={quoted(value)}" for key, value in values.items()]
    cfg = config.load(run.overrides)
    run.directory = config.run_directory(cfg, config.identity(cfg, run.overrides))


def final(value: Mapping[str, Any], run: Run) -> Any:
    """A value that depends on other runs."""
    if "best_of" in value:
        trials = [other for other in run.needs if other.settings["seed"] == value["seed"]]
        scores = [result_files.last_score(trial.result, value["split"]) for trial in trials]
        return value["best_of"][scores.index(max(scores))]
    with_others = {**run.settings, **value["run_with"]}
    return next(other.directory for other in run.needs if other.settings.items() <= with_others.items())


def quoted(value: Any) -> str:
    """A value as Hydra reads it."""
    if value is None:
        return "null"
    text = str(value)
    return f"'{text}'" if any(character in text for character in "=,{}[]() ") else text


def find_result(run: Run, known: Path | None) -> dict[str, Any] | None:
    """The result of a run that finished before, in its own directory or among the known ones."""
    cfg = config.load(run.overrides)
    resolved = config.resolved(cfg)
    result = results.stored(run.directory, resolved, lambda: config.inputs(cfg))
    if result is None and known is not None:
        path = (known / run.directory.relative_to("runs")).with_suffix(".json")
        found = result_files.read(path) if path.exists() else None
        if found and found["config"] == json.loads(json.dumps(resolved)):
            result = None if results.changed_inputs(found, config.inputs(cfg)) else found
    return result


# running them


class Sweep:
    """The queue: starts what is ready, watches what runs, tries again what failed once."""

    def __init__(self, runs: list[Run], jobs: int, known: Path | None, console: Console):
        self.runs, self.jobs, self.known, self.console = runs, jobs, known, console
        self.gpus = gpus()
        self.stopping = False
        for run in runs:
            self._look(run)

    def _look(self, run: Run) -> None:
        """Settle a run if what it needs has ended."""
        if run.state != "waiting":
            return
        if any(need.state == "failed" for need in run.needs):
            run.state = "failed"
        elif all(need.state == "finished" for need in run.needs):
            if not run.overrides:
                resolve(run)
            run.result = find_result(run, self.known)
            run.state = "finished" if run.result else "waiting"

    def work(self) -> None:
        """Run everything; returns when nothing is left, or when stopped."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)
        with Live(console=self.console, refresh_per_second=1, transient=True) as live:
            while (ready := self._ready()) or self._running():
                if ready and not self.stopping and len(self._running()) < self.jobs:
                    self._start(ready[0])
                    continue
                if self.stopping and not self._running():
                    break
                if self.console.is_terminal:
                    live.update(self.table())
                time.sleep(0.2)
                self._collect()

    def _ready(self) -> list[Run]:
        for run in self.runs:
            if (run.state == "waiting" and not run.overrides) or any(need.state == "failed" for need in run.needs):
                self._look(run)
        ready = (run for run in self.runs if run.state == "waiting" and run.overrides)
        return sorted(ready, key=lambda run: run.tries)  # what failed comes after the others

    def _running(self) -> list[Run]:
        return [run for run in self.runs if run.state == "running"]

    def _start(self, run: Run) -> None:
        run.directory.mkdir(parents=True, exist_ok=True)
        environment = {"OMP_NUM_THREADS": "1", **os.environ} if self.jobs > 1 else dict(os.environ)
        if not config.WANTS_TRACEBACK:
            environment.pop("HYDRA_FULL_ERROR", None)  # set for this process by config.guarded
        free = [gpu for gpu in self.gpus if gpu not in {other.gpu for other in self._running()}]
        if free:
            run.gpu = environment["CUDA_VISIBLE_DEVICES"] = free[0]
        command = [sys.executable, RUN, *run.overrides, "train.progress=false"]
        with run.log.open("w") as log:
            run.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                preexec_fn=end_with_parent,
            )  # fmt: skip
        run.state, run.began, run.tries = "running", time.monotonic(), run.tries + 1

    def _collect(self) -> None:
        for run in self._running():
            if run.process.poll() is None:
                continue
            run.gpu = None
            if run.process.returncode == 0:
                run.result = find_result(run, None)
            run.state = "finished" if run.result else self._after_failure(run)
            self.console.print(f"{self.counts()}  {run.name}: {self._outcome(run)}", highlight=False)

    def _after_failure(self, run: Run) -> str:
        if self.stopping:
            return "stopped"
        return "waiting" if run.tries < TRIES else "failed"

    def _outcome(self, run: Run) -> str:
        if run.result:
            scores = run.result["scores"].get("last", {}).get("score", float("nan"))
            return f"{run.result['status']}, last {scores:.4f}, {time.monotonic() - run.began:.0f} s"
        return {"stopped": "stopped, it continues next time", "waiting": "failed, is tried again"}.get(
            run.state, "failed"
        )

    def _stop(self, number: int, frame: Any) -> None:
        if not self.stopping:
            self.console.print("stopping: the runs keep what they have (this takes a step)")
        self.stopping = True
        for run in self._running():
            run.process.send_signal(signal.SIGTERM)

    # what a person sees

    def counts(self) -> str:
        """How many runs are finished, and the time left."""
        finished = sum(run.state == "finished" for run in self.runs)
        return f"{finished}/{len(self.runs)} {self.time_left()}"

    def time_left(self) -> str:
        """Estimate from finished runs of the same task and method, else of the task, else of all."""
        seconds = [self.estimate(run) for run in self.runs if run.state in ("waiting", "running")]
        if any(value is None for value in seconds):
            return "(time unknown: nothing like it has finished yet)"
        spent = sum(time.monotonic() - run.began for run in self._running())
        return f"({words(max(0.0, sum(seconds) - spent) / self.jobs)} left)"

    def estimate(self, run: Run) -> float | None:
        """Seconds that a run will take; None if nothing like it has finished yet."""
        finished = [other for other in self.runs if other.result]
        for keys in (("task", "method"), ("task",), ()):
            like = [o for o in finished if all(o.settings.get(k) == run.settings.get(k) for k in keys)]
            if like:
                return statistics.median(other.result["cost"]["seconds"] for other in like)
        return None

    def table(self) -> Table:
        """What runs and what comes next."""
        table = Table(title=self.counts())
        for column in ("run", "state", "time"):
            table.add_column(column)
        shown = [*self._running(), *(run for run in self.runs if run.state == "failed"), *self._ready()]
        for run in shown[:SHOWN]:
            spent = words(time.monotonic() - run.began) if run.state == "running" else ""
            table.add_row(run.name, run.state, spent)
        return table

    def summary(self) -> str:
        """How it ended: the counts, and the last lines of every failure."""
        states = [run.state for run in self.runs]
        lines = [", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))]
        for run in self.runs:
            if run.state == "failed":
                lines += [f"failed: {run.name}", *(f"    {line}" for line in last_lines(run))]
        return "\n".join(lines)


def last_lines(run: Run) -> list[str]:
    """The end of a failed run's log, and where it is."""
    if not run.tries:
        return ["not run: a run that it needs failed"]
    return [*run.log.read_text(errors="replace").splitlines()[-3:], f"log: {run.log}"]


def words(seconds: float) -> str:
    """A duration to be read by a person."""
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"


def gpus() -> list[str]:
    """The GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu for gpu in visible.split(",") if gpu.strip() not in ("", "-1")]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True).stdout
    return [str(number) for number, line in enumerate(listed.splitlines()) if line.startswith("GPU")]


def end_with_parent() -> None:
    """Ask Linux to stop this process when the sweep is killed; elsewhere it runs to its end."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


# the command line


def read_sweep(name: str) -> dict[str, Any]:
    """A file of configs/sweep, or of another folder.

    Raises:
        UserError: there is none of that name, or it is no sweep.
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
        for key, listed in part.items():
            for value in listed if isinstance(listed, list) else [listed]:
                if isinstance(value, dict) and not dependent(value):
                    raise UserError(
                        f"{path}, {key}: a value that depends on other runs is {{best_of: [VALUES], split: SPLIT, "
                        f"seed: K}} or {{run_with: {{OVERRIDE: VALUE}}}}, not {value}"
                    )


def dependent(value: Mapping[str, Any]) -> bool:
    """Whether a value says which other runs it depends on."""
    if set(value) == {"best_of", "split", "seed"}:
        return isinstance(value["best_of"], list) and bool(value["best_of"])
    return set(value) == {"run_with"} and isinstance(value["run_with"], dict)


def parted(sweep: Mapping[str, Any], overrides: Sequence[str]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The overrides that choose among the sweep's values, and those that go to every run.

    Raises:
        UserError: an override that is none, or a value that the sweep does not have.
    """
    varied: dict[str, set[str]] = {}
    for block in sweep["runs"]:
        for key, value in block.items():
            varied.setdefault(key, set()).update(map(str, value if isinstance(value, list) else [value]))
    chosen, extra = {}, {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"'{override}' is no override; write key=value")
        if key not in varied:
            extra[key] = value
            continue
        chosen[key] = value.split(",")
        if unknown := set(chosen[key]) - varied[key]:
            there = ", ".join(sorted(varied[key]))
            raise UserError(f"{key}={','.join(sorted(unknown))}: the sweep has {key} {there}")
    return chosen, extra


@config.guarded
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="a file of configs/sweep")
    parser.add_argument("overrides", nargs="*", help="overrides of run.py")
    parser.add_argument("--jobs", type=int, help="runs side by side (default: one per GPU, else one)")
    parser.add_argument("--known", type=Path, help="results/runs: what is finished there is not run again either")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and the time they take, start none")
    arguments = parser.parse_intermixed_args()
    if arguments.jobs is not None and arguments.jobs < 1:
        raise UserError(f"--jobs {arguments.jobs}: at least one run must go at a time; leave it out for one per GPU")
    if arguments.known and not arguments.known.is_dir():
        raise UserError(f"--known {arguments.known}: no such folder; give one of results, as results/runs is")
    sweep = read_sweep(arguments.name)
    runs = expand(sweep, *parted(sweep, arguments.overrides))
    jobs = arguments.jobs or max(1, len(gpus()))
    console = Console(soft_wrap=True)
    queue = Sweep(runs, jobs, arguments.known and arguments.known.resolve(), console)
    console.print(f"{arguments.name}: {sweep['about']}\n{len(runs)} runs, {jobs} at a time: {queue.counts()}")
    if arguments.dry_run:
        for run in runs:
            console.print(f"  {run.state:9s} {run.name}", highlight=False)
        return 0
    queue.work()
    console.print(queue.summary(), highlight=False)
    if queue.stopping:
        return 128 + signal.SIGINT
    return int(any(run.state == "failed" for run in runs))


if __name__ == "__main__":
    sys.exit(main())
