"""Kill real runs with SIGKILL at random moments, continue them, and compare them with runs that were not killed.

    python scripts/torture.py --kills 20 [--methods increlora adalora] [--seed 0]

Every other kill waits for a checkpoint to be half written. The runs are small (tiny backbone, synthetic
task) and take the same path as any other: run.py in a process of its own. Exits 0 only if every
continued run has the result and the weights of the undisturbed one, to the last bit.
"""

import argparse
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from increlora import result_files
from increlora.glue import config

ROOT = Path(__file__).resolve().parent.parent
ARGUMENTS = [
    "backbone=tiny", "task=synthetic_entailment", "task.train_size=400", "task.dev_size=60", "train.batch_size=20",
    "train.epochs=4", "train.warmup_steps=6", "train.eval_interval=9", "train.log_interval=1", "train.progress=false",
    "train.checkpoint_interval=3", "device=cpu", "tracker=jsonl",
]  # fmt: skip
WEIGHTS = ("last.safetensors", "best.safetensors")


@dataclass
class Trial:
    """One kill: the step at which it came, the step from which the run continued, and what differs in the end."""

    method: str
    killed_at: int
    in_checkpoint: bool
    resumed_at: int
    differences: list[str]


def start(method: str, folder: Path) -> subprocess.Popen:
    command = [sys.executable, ROOT / "run.py", *ARGUMENTS, f"method={method}", f"run_dir={folder}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(method: str, folder: Path) -> str:
    """Run to the end; returns what was printed."""
    process = start(method, folder)
    printed, _ = process.communicate(timeout=600)
    if process.returncode:
        raise SystemExit(f"a run failed with exit code {process.returncode}:\n{printed}")
    return printed


def last_step(folder: Path) -> int:
    """The last step in the local record, 0 if there is none yet."""
    record = folder / "metrics.jsonl"
    steps = re.findall(r'^\{"step": (\d+)', record.read_text() if record.exists() else "", flags=re.M)
    return int(steps[-1]) if steps else 0


def kill(process: subprocess.Popen, folder: Path, at_step: int, in_checkpoint: bool) -> None:
    """SIGKILL after a step is recorded, or while the next checkpoint after it is being written."""
    while last_step(folder) < at_step and process.poll() is None:
        time.sleep(0.001)
    while in_checkpoint and process.poll() is None:
        if not list(folder.glob(".*.tmp")):
            continue
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.01)  # until it stands still
        if list(folder.glob(".*.tmp")):
            break
        process.send_signal(signal.SIGCONT)  # the file was whole by then: the next one
    process.kill()
    process.communicate()


def essence(folder: Path) -> dict:
    """All of a result that does not depend on when and how often it ran."""
    result = result_files.read(folder / result_files.FILE_NAME)
    result["curve"] = [{key: value for key, value in point.items() if key != "seconds"} for point in result["curve"]]
    result["cost"] = {
        key: value for key, value in result["cost"].items() if key in ("steps", "tokens", "padded_tokens")
    }
    return {key: value for key, value in result.items() if key != "code"}


def compare(folder: Path, undisturbed: Path) -> list[str]:
    """Names of what differs between two finished runs."""
    a, b = essence(folder), essence(undisturbed)
    different = [key for key in a if a[key] != b[key]]
    return different + [n for n in WEIGHTS if (folder / n).read_bytes() != (undisturbed / n).read_bytes()]


def trial(method: str, folder: Path, undisturbed: Path, at_step: int, in_checkpoint: bool) -> Trial:
    """One run, killed once, continued to the end."""
    process = start(method, folder)
    kill(process, folder, at_step, in_checkpoint)
    killed_at, half_written = last_step(folder), bool(list(folder.glob(".*.tmp")))
    printed = finish(method, folder)
    resumed = re.search(r"continuing from step (\d+)", printed)
    resumed_at = int(resumed[1]) if resumed else 0
    return Trial(method, killed_at, half_written, resumed_at, compare(folder, undisturbed))


@config.guarded
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--methods", nargs="+", default=["increlora", "adalora"])
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    moments = random.Random(arguments.seed)
    trials = []
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(arguments.kills):
            method = arguments.methods[number // 2 % len(arguments.methods)]
            undisturbed = Path(scratch, f"undisturbed-{method}")
            if not undisturbed.exists():
                finish(method, undisturbed)
            steps = essence(undisturbed)["cost"]["steps"]
            moment = moments.randrange(0, steps - 1)
            trials.append(trial(method, Path(scratch, str(number)), undisturbed, moment, bool(number % 2)))
            report(number, trials[-1])
    identical = sum(not t.differences for t in trials)
    print(
        f"kills {len(trials)} ({sum(t.in_checkpoint for t in trials)} with a checkpoint half written), "
        f"resumes {sum(t.resumed_at > 0 for t in trials)}, from the start {sum(t.resumed_at == 0 for t in trials)}, "
        f"steps redone {sum(max(0, t.killed_at - t.resumed_at) for t in trials)}, identical results {identical}"
    )
    return 0 if identical == len(trials) else 1


def report(number: int, done: Trial) -> None:
    where = "while a checkpoint was being written" if done.in_checkpoint else "at a random moment"
    redone = max(0, done.killed_at - done.resumed_at)
    end = f"DIFFERENT in {', '.join(done.differences)}" if done.differences else "identical"
    print(
        f"kill {number + 1:3d} {done.method}: after step {done.killed_at} {where}, "
        f"continued from {done.resumed_at}, {redone} steps redone, {end}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
