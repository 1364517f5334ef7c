"""The queue of a sweep: it starts the runs that are ready, watches them, and repeats a failed run once."""

import ctypes
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from increlora.glue import config
from increlora.glue.sweep_plan import Run, find_result, resolve

RUN = config.CONFIGS.parent / "run.py"
TRIES = 2
SHOWN = 12  # rows of the live table


# running them


class Sweep:
    """The queue: it starts the runs that are ready, watches them, and repeats a failed run once."""

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
        command = [sys.executable, str(RUN), *run.overrides, "train.progress=false"]
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
        return {"stopped": "stopped, it continues next time", "waiting": "failed, will be tried again"}.get(
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
        known = [value for value in seconds if value is not None]
        if len(known) < len(seconds):
            return "(time unknown: nothing like it has finished yet)"
        spent = sum(time.monotonic() - run.began for run in self._running())
        return f"({words(max(0.0, sum(known) - spent) / self.jobs)} left)"

    def estimate(self, run: Run) -> float | None:
        """Seconds that a run will take; None if nothing like it has finished yet."""
        finished = [(other.settings, other.result["cost"]["seconds"]) for other in self.runs if other.result]
        for keys in (("task", "method"), ("task",), ()):
            like = [cost for settings, cost in finished if all(settings.get(k) == run.settings.get(k) for k in keys)]
            if like:
                return statistics.median(like)
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
    """A duration in words."""
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
