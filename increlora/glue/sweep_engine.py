"""The runs of a sweep, started by Parsl: here in threads, or on a cluster by a file of configs/cluster.

Parsl decides what runs when, waits for what a run needs, and repeats a failed run once. What a run does if it is cut
off, is running elsewhere or has finished is run.py's business: it holds a lock, writes checkpoints, keeps its result.
"""

import concurrent.futures
import fcntl
import functools
import os
import queue
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.live import Live
from rich.progress import track
from rich.table import Table

from increlora.errors import Busy, UserError, first_line
from increlora.glue import config
from increlora.glue.sweep_plan import Run, find_result, resolve

RUN = config.CONFIGS.parent / "run.py"
CLUSTERS = config.CONFIGS / "cluster"
SHOWN = 12  # rows of the live table
AGAIN = 5.0  # seconds until a run that another process is doing is looked at again
CUT = 1e-3  # of a failure: how much it counts that a run was cut off, as by a time limit
LOST = ("ManagerLost", "WorkerLost")  # what Parsl raises if the job of a run has ended
END_WITH_PARENT = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 15)  # PR_SET_PDEATHSIG, SIGTERM
if os.getppid() != int(sys.argv[1]):
    sys.exit(143)
os.execv(sys.argv[2], sys.argv[2:])
"""


def ending_with_this(command: Sequence[str]) -> list[str]:
    """A command that Linux tells to stop when this process ends; elsewhere it runs to its end."""
    if sys.platform != "linux":
        return list(command)
    return [os.readlink("/proc/self/exe"), "-SEc", END_WITH_PARENT, str(os.getpid()), *command]


class Failed(Exception):
    """A run ended with an error."""


class Cut(Exception):
    """A run was told to stop; it continues when it is started again."""


# what happens where a run runs: in a thread of this process, or in a worker on a node of a cluster

children: list[subprocess.Popen] = []  # of this process
stopping = threading.Event()
gpus_to_share: "queue.Queue[str]" = queue.Queue()  # of this machine, one for each run at a time


def train(overrides: Sequence[str], directory: str, folder: str, environment: Mapping[str, str], here: bool) -> None:
    """One run from its start or its checkpoint to its end; what it prints is in sweep.log.

    Args:
        directory: of the run, within `folder`, where the sweep was started.
        here: on the machine and at the terminal of the sweep, whose Ctrl-C must not reach it twice.

    Raises:
        Cut, Failed: it was stopped, or ended with an error.
    """
    command = [sys.executable, str(RUN), *overrides, "train.progress=false"]
    gpu = gpus_to_share.get() if here and gpus() else None
    environment = {**os.environ, **environment, **({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})}
    log = Path(folder, directory, "sweep.log")
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        code = Busy.exit_code
        while code == Busy.exit_code and not stopping.is_set():
            while is_held(log.parent) and not stopping.is_set():  # another process has it: until it is done, or gone
                stopping.wait(AGAIN)
            if stopping.is_set():  # the log is the other's
                break
            with log.open("w") as output:
                child = subprocess.Popen(
                    ending_with_this(command), cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT,
                    start_new_session=here,
                )  # fmt: skip
            children.append(child)
            if stopping.is_set():
                child.send_signal(signal.SIGTERM)
            code = child.wait()
            children.remove(child)
    finally:
        if gpu:
            gpus_to_share.put(gpu)
    if stopping.is_set() or code in (128 + signal.SIGTERM, -signal.SIGTERM):
        raise Cut
    if code:
        raise Failed(f"exit code {code}")


def is_held(directory: Path) -> bool:
    """Whether a process holds the lock of a run's directory (`checkpoint.exclusive`)."""
    try:
        with (directory / ".lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


# where runs can run


@dataclass
class Cluster:
    """A cluster with SLURM: a file of configs/cluster, or of another folder.

    Args:
        partition, account, qos, constraint: as for sbatch; null leaves them out.
        time: walltime of a job, HH:MM:SS; what is not done by then goes on in the next job.
        jobs: how many jobs at most, each with one node.
        runs_per_job: how many runs side by side in a job.
        gpus_per_job: GPUs of a job; each run sees one of them alone. 0: no GPU.
        cpus_per_run, memory_per_job: cores and GB; null: what the cluster gives.
        notice: seconds before the end at which the runs are told to write a checkpoint.
        setup: lines of shell before the runs, e.g. to activate an environment.
        options: more lines for sbatch, e.g. `#SBATCH --exclude=node7`.
        address: of the machine where the sweep is started, as nodes reach it; null: found out.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str = "04:00:00"
    jobs: int = 4
    runs_per_job: int = 1
    gpus_per_job: int = 1
    cpus_per_run: int | None = None
    memory_per_job: int | None = None
    notice: int = 120
    setup: list[str] = field(default_factory=list)
    options: list[str] = field(default_factory=list)
    address: str | None = None

    @classmethod
    def read(cls, name: str) -> "Cluster":
        """A file of configs/cluster by its name, or any by its path.

        Raises:
            UserError: there is none, or it has keys or values that a cluster has not.
        """
        path = Path(name) if name.endswith(".yaml") else CLUSTERS / f"{name}.yaml"
        if not path.exists():
            there = ", ".join(sorted(other.stem for other in CLUSTERS.glob("*.yaml")))
            raise UserError(f"--on {name}: there is no such cluster; there is: local, {there}, or give a file")
        try:
            return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), OmegaConf.load(path)))
        except Exception as error:
            raise UserError(f"{path} does not describe a cluster: {first_line(error)}") from None

    def executor(self) -> Any:
        """Parsl's executor: a job of SLURM is a block of workers, each of which does one run at a time."""
        from parsl.executors import HighThroughputExecutor
        from parsl.launchers import SrunLauncher
        from parsl.providers import SlurmProvider

        class Provider(SlurmProvider):
            status_polling_interval = 20  # seconds; Parsl asks once a minute, and so long an ended job is not replaced

        programs = sysconfig.get_path("scripts")  # of this environment, Parsl's among them
        setup = [f"export PATH={shlex.quote(programs)}:$PATH", *self.setup]
        # the notice goes to the processes of the job's step, which srun makes
        options = [*self.options, f"#SBATCH --signal=TERM@{self.notice}"]
        provider = Provider(
            partition=self.partition, account=self.account, qos=self.qos, constraint=self.constraint,
            cores_per_node=self.cpus_per_run and self.cpus_per_run * self.runs_per_job,
            mem_per_node=self.memory_per_job, gpus_per_node=self.gpus_per_job or None, walltime=self.time,
            init_blocks=0, min_blocks=0, max_blocks=self.jobs, exclusive=False, scheduler_options="\n".join(options),
            worker_init="\n".join(setup), launcher=SrunLauncher(), cmd_timeout=60,
        )  # fmt: skip
        accelerators = [str(number) for number in range(self.gpus_per_job)]
        return HighThroughputExecutor(
            label="runs", provider=provider, address=self.address, max_workers_per_node=self.runs_per_job,
            available_accelerators=accelerators, encrypted=False, heartbeat_period=10, heartbeat_threshold=60,
            interchange_launch_cmd=ending_with_this([sys.executable, str(Path(programs, "interchange.py"))]),
        )  # fmt: skip


# running them


class Sweep:
    """The runs and what became of them; `work` runs them all.

    Args:
        jobs: runs side by side on this machine.
        known: a folder of results; what is finished there is not run again.
        cluster: where to run instead of this machine.
    """

    def __init__(
        self, runs: list[Run], jobs: int, known: Path | None, console: Console, cluster: Cluster | None = None
    ):
        self.runs, self.jobs, self.known, self.console, self.cluster = runs, jobs, known, console, cluster
        self.progress: dict[str, float | None] = {}  # directory -> when a run that was cut off last wrote a checkpoint
        self.lock = threading.Lock()  # of `settle`, which Parsl's threads call too
        for run in track(runs, "planning", console=console, transient=True, disable=not console.is_terminal):
            self.look(run)

    def look(self, run: Run) -> None:
        """Settle a run if all that it needs has finished: its directory, and its result if it has one."""
        if run.state != "waiting" or any(need.state != "finished" for need in run.needs):
            return
        try:
            if not run.overrides:
                resolve(run)
            run.result = find_result(run, self.known)
        except UserError as error:
            run.state, run.error = "failed", str(error)
        else:
            run.state = "finished" if run.result else "waiting"

    def work(self) -> None:
        """Run everything; returns when nothing is left, or when stopped."""
        import parsl
        from parsl.executors import ThreadPoolExecutor

        for gpu in gpus():
            gpus_to_share.put(gpu)
        executor = self.cluster.executor() if self.cluster else ThreadPoolExecutor("runs", max_threads=self.jobs)
        settings = parsl.Config(
            executors=[executor], retries=1, retry_handler=self._counts, exit_mode="skip", max_idletime=30,
            run_dir=str(Path("runs", ".parsl") if self.cluster else Path(tempfile.gettempdir(), "increlora-parsl")),
            initialize_logging=self.cluster is not None,
        )  # fmt: skip
        engine = parsl.load(settings)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)
        try:
            self._submit(parsl)
            self._watch()
        finally:
            stopping.set()
            engine.cleanup()  # on a cluster: its jobs are cancelled
            parsl.clear()
            stopping.clear()

    def _submit(self, parsl: Any) -> None:
        """Hand every run that is not settled to Parsl, after those that it needs."""
        start = parsl.python_app(train, executors=["runs"])

        @parsl.join_app
        def begin(index: int, inputs: Sequence[Any] = ()) -> concurrent.futures.Future:
            return self._begin(self.runs[index], start)

        for index, run in enumerate(self.runs):
            if run.state == "waiting":
                run.future = begin(index, inputs=[need.future for need in run.needs if need.future])

    def _begin(self, run: Run, start: Any) -> concurrent.futures.Future:
        """What it needs has ended: start it, unless it cannot begin or is finished."""
        for need in run.needs:
            self.settle(need)
        if any(need.state != "finished" for need in run.needs):
            raise Failed("a run that it needs failed")
        self.look(run)
        if run.state != "waiting":
            done: concurrent.futures.Future = concurrent.futures.Future()
            done.set_result(None)
            return done
        environment = {"HYDRA_FULL_ERROR": str(int(config.WANTS_TRACEBACK))}  # config.guarded sets it for this process
        if self.side_by_side > 1 and "OMP_NUM_THREADS" not in os.environ:
            environment["OMP_NUM_THREADS"] = "1"
        run.tries += 1
        return start(run.overrides, str(run.directory), str(Path.cwd()), environment, self.cluster is None)

    def _counts(self, error: Exception, task: Any) -> float:
        """How much Parsl counts a try that failed; above 1 in all, a run is not tried again."""
        if stopping.is_set() or task["func_name"] != train.__name__:
            return 2
        directory, cost = task["args"][1], 1.0
        if isinstance(error, Cut) or type(error).__name__ in LOST:
            before, self.progress[directory] = self.progress.get(directory), progress(Path(directory))
            cost = CUT if before != self.progress[directory] else 0.5  # twice without a step between is a failure
        if task["fail_cost"] + cost <= 1:
            words = "failed, will be tried again" if cost == 1 else "cut off, it continues"
            self.say(f"{self.counts()}  {directory}: {words}")
        return cost

    def _watch(self) -> None:
        """Until all is done or stopped: tell what ended, and show what goes on."""
        left = {run.future: run for run in self.runs if run.future}
        with Live(console=self.console, refresh_per_second=1, transient=True) as live:
            while left and not (stopping.is_set() and self.cluster):
                for future in concurrent.futures.wait(left, 0.5, concurrent.futures.FIRST_COMPLETED).done:
                    self.settle(left.pop(future))
                if self.console.is_terminal:
                    live.update(self.table())
        for run in left.values():
            self.settle(run)

    def settle(self, run: Run) -> None:
        """What became of a run that has ended, or will not begin."""
        with self.lock:
            if run.state != "waiting":
                return
            try:
                run.result = find_result(run, None) if run.overrides else None
            except UserError as error:
                run.error = str(error)
            told = run.future.exception() if run.future and run.future.done() else None
            if told and not run.log.exists() and run.tries:
                run.error = first_line(cause(told))
            run.state = "finished" if run.result else "failed"
            if stopping.is_set() and not run.result:
                run.state = "stopped" if run.tries else "not begun"
            if run.state != "not begun":
                self.say(f"{self.counts()}  {run.name}: {outcome(run)}")

    def _stop(self, number: int, frame: Any) -> None:
        if not stopping.is_set():
            self.say("stopping: the runs keep what they have (this takes a step)")
        stopping.set()
        for child in list(children):
            child.send_signal(signal.SIGTERM)

    # what a person sees

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False)

    def counts(self) -> str:
        """How many runs are finished, and the time left."""
        finished = sum(run.state == "finished" for run in self.runs)
        return f"{finished}/{len(self.runs)} {self.time_left()}"

    def time_left(self) -> str:
        """Estimate from finished runs of the same task and method, else of the task, else of all."""
        typical = self.typical()
        seconds = [estimate(run, typical) for run in self.runs if run.state == "waiting"]
        if None in seconds:
            return "(time unknown: nothing like it has finished yet)"
        return f"({words(sum(filter(None, seconds)) / self.side_by_side)} left)"

    def typical(self) -> dict[tuple, float]:
        """The median of the seconds that finished runs took, by task and method, by task, and of all."""
        found: dict[tuple, list[float]] = {}
        for run in self.runs:
            for like in likes(run) if run.result else ():
                found.setdefault(like, []).append(run.result["cost"]["seconds"])
        return {like: statistics.median(seconds) for like, seconds in found.items()}

    @property
    def side_by_side(self) -> int:
        return self.cluster.jobs * self.cluster.runs_per_job if self.cluster else self.jobs

    def table(self) -> Table:
        """What runs and what failed."""
        table = Table(title=self.counts())
        for column in ("run", "state", "time"):
            table.add_column(column)
        begun = [run for run in self.runs if run.state == "waiting" and run.tries]
        for run in begun[:SHOWN]:
            log = run.log
            since = words(time.time() - log.stat().st_ctime) if log.exists() else ""
            table.add_row(run.name, "running" if since else "submitted", since)
        for run in [run for run in self.runs if run.state == "failed"][: SHOWN - len(begun[:SHOWN])]:
            table.add_row(run.name, run.state, "")
        return table

    def summary(self) -> str:
        """How it ended: the counts, and the last lines of every failure."""
        states = [run.state for run in self.runs]
        lines = [", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))]
        for run in self.runs:
            if run.state == "failed":
                lines += [f"failed: {run.name}", *(f"    {line}" for line in last_lines(run))]
        return "\n".join(lines)


def cause(error: BaseException) -> Exception:
    """What stopped a run, out of what Parsl wrapped around it."""
    while inner := getattr(error, "dependent_exceptions_tids", None):
        error = inner[0][0]
    return error if isinstance(error, Exception) else Exception(str(error))


def progress(directory: Path) -> float | None:
    """When a run last wrote a checkpoint, None if there is none."""
    checkpoint = directory / "checkpoint.safetensors"
    return checkpoint.stat().st_mtime if checkpoint.exists() else None


def likes(run: Run) -> list[tuple]:
    """What finished runs may have in common with a run, the most first."""
    task, method = (run.settings.get(key) for key in ("task", "method"))
    return [(task, method), (task,), ()]


def estimate(run: Run, typical: Mapping[tuple, float]) -> float | None:
    """Seconds that a run will take; None if nothing like it has finished yet."""
    return next((typical[like] for like in likes(run) if like in typical), None)


def outcome(run: Run) -> str:
    """How a run ended, in words."""
    if run.result:
        score = run.result["scores"].get("last", {}).get("score", float("nan"))
        return f"{run.result['status']}, last {score:.4f}, {run.result['cost']['seconds']:.0f} s"
    return "stopped, it continues next time" if run.state == "stopped" else "failed"


def last_lines(run: Run) -> list[str]:
    """Why a run failed: the message of the plan, or the end of its log and where that is."""
    if run.error:
        return run.error.splitlines()
    if not run.tries:
        return ["not run: a run that it needs failed"]
    if not run.log.exists():
        return ["it left no log"]
    return [*run.log.read_text(errors="replace").splitlines()[-3:], f"log: {run.log}"]


def words(seconds: float) -> str:
    """A duration in words."""
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"


@functools.cache
def gpus() -> tuple[str, ...]:
    """The GPUs of this machine that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(gpu for gpu in visible.split(",") if gpu.strip() not in ("", "-1"))
    if not shutil.which("nvidia-smi"):
        return ()
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True).stdout
    return tuple(str(number) for number, line in enumerate(listed.splitlines()) if line.startswith("GPU"))
