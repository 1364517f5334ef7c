"""run.py as a person uses it: one run from command line to result file, and its errors, in processes of their own."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from naming import naming
from warm_python import python

SMALL = [
    "backbone=tiny", "task=synthetic_entailment", "task.train_size=400", "task.dev_size=60", "train.batch_size=20",
    "train.epochs=2", "train.warmup_steps=5", "train.learning_rate=5e-3", "method.top_h=4", "train.log_interval=1",
    "train.progress=false", "device=cpu",
]  # fmt: skip


def run(
    *overrides: str, cwd=None, timeout: float = 300, cold: bool = False, **environment: str
) -> subprocess.CompletedProcess:
    """The finished process; a cold one loads its libraries itself, in the given environment."""
    return subprocess.run(
        [sys.executable if cold else python(), ROOT / "run.py", *overrides],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env={**os.environ, **environment},
    )


def test_a_run_from_command_line_to_result_file_and_again(tmp_path):
    first = run(*SMALL, cwd=tmp_path, cold=True)
    assert first.returncode == 0, first.stderr
    (path,) = tmp_path.rglob("result.json")
    assert path.relative_to(tmp_path).parts[:5] == ("runs", "tiny", "r2", "increlora", "synthetic_entailment")
    result = json.loads(path.read_text())
    assert result["status"] == "finished" and sum(result["ranks"]["last"].values()) == 24
    assert result["run"]["seed"] == 41 and "train.epochs=2" in result["run"]["overrides"]
    assert result["data"]["source"] == "synthetic" and len(result["data"]["fingerprint"]) == 64
    assert [a["step"] for a in result["allocations"]] == [10, 15, 20]
    assert str(tmp_path) not in path.read_text() and str(ROOT) not in path.read_text()
    lines = [json.loads(line) for line in path.with_name("metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["status"] == "finished"
    assert "total rank 12 -> 24" in first.stdout and "wandb sync" in first.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs"]  # nothing is strewn about
    again = run(*SMALL, cwd=tmp_path)
    assert again.returncode == 0 and "this run was finished before" in again.stdout
    assert json.loads(path.read_text()) == result
    anew = run(*SMALL, "overwrite=true", "tracker=jsonl", cwd=tmp_path)
    assert anew.returncode == 0 and json.loads(path.read_text())["curve"][-1]["step"] == 40


def test_every_command_line_wins_over_the_method(tmp_path):
    done = run(
        *SMALL, "method=full", "~method.top_h", "train.max_steps=3", "tracker=jsonl", "run_dir=here", cwd=tmp_path
    )
    assert done.returncode == 2  # full fine-tuning has no top_h, so there is none to remove
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") <= 2


NO_HUB = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": "/nonexistent"}
ERRORS = {
    "unknown task": (["task=rtee"], "Could not find 'task/rtee'"),
    "unknown method": (["method=loraa"], "increlora"),
    "unknown backbone": (["backbone=gpt"], "deberta_v3_base"),
    "unknown field": (["train.learning_rat=1"], "learning_rat"),
    "no network for weights": (["task=rte"], "backbone.path=DIR"),
    "no network for data": (["backbone=tiny", "task=rte"], "task.data_dir=DIR"),
    "no such folder": (["backbone=tiny", "task=rte", "task.data_dir=nowhere"], "nowhere: no such folder"),
    "no such matrix": ([*SMALL, "method.matrices=[quary]"], "quary; the backbone has: query, key"),
    "a head that stays at random": ([*SMALL, "method.head=null"], "method.head does not match classifier.bias"),
    "budget below the initial rank": ([*SMALL, "method.init_rank=3"], "target_rank 2 < init_rank 3"),
    "last growth after the last step": (
        [*SMALL, "method.top_h=1"],
        "12 growths, at steps 10 to 65, but step 38 is the last",
    ),
    "a GPU that is absent": ([*SMALL, "device=cuda:7"], "Use device=cpu or device=auto"),
    "wrong precision": ([*SMALL, "precision=fp7"], "precision must be one of"),
}


def test_errors_are_two_lines_fast_and_leave_nothing_behind(tmp_path):
    for name, (overrides, said) in ERRORS.items():
        with naming(name):
            assert_refused(name, overrides, said, tmp_path)


def assert_refused(name: str, overrides: list[str], said: str, tmp_path) -> None:
    # well below the 48 s for which the hub's own clients would retry, also on a busy machine
    of_network = "network" in name
    done = run(*overrides, cwd=tmp_path, timeout=40 if of_network else 300, cold=of_network, **NO_HUB)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") <= 2
    assert not list(tmp_path.iterdir())


def test_a_traceback_is_there_for_those_who_ask(tmp_path):
    done = run("task=rtee", cwd=tmp_path, HYDRA_FULL_ERROR="1")
    assert done.returncode == 1 and "Traceback" in done.stderr


def interrupted(tmp_path, folder: str, number: int, *overrides: str) -> subprocess.CompletedProcess:
    """A run that gets a signal once it has recorded a few steps."""
    command = [python(), ROOT / "run.py", *SMALL, "tracker=jsonl", f"run_dir={folder}", *overrides]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    record = tmp_path / folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (record.exists() and record.read_text().count("\n") > 3) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def essence(folder) -> dict:
    """All of a result that does not depend on when and how often it ran."""
    result = json.loads((folder / "result.json").read_text())
    result["curve"] = [{k: v for k, v in point.items() if k != "seconds"} for point in result["curve"]]
    return {k: result[k] for k in ("status", "config", "scores", "ranks", "curve", "allocations", "parameters", "data")}


LONGER = ("train.epochs=8", "train.checkpoint_interval=1000")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run(*SMALL, "tracker=jsonl", "run_dir=whole", *LONGER, cwd=folder).returncode == 0
    return folder / "whole"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_was_told_to_stop_continues_and_ends_the_same(tmp_path, number, whole):
    stopped = interrupted(tmp_path, "cut", number, *LONGER)
    assert stopped.returncode == 128 + number and "the same command continues from there" in stopped.stderr
    lines = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1] == {"status": "interrupted"} and not (tmp_path / "cut" / "result.json").exists()
    step = lines[-2]["step"]
    again = run(*SMALL, "tracker=jsonl", "run_dir=cut", *LONGER, cwd=tmp_path)
    assert again.returncode == 0 and re.search(rf"continuing from step {step}\b", again.stdout), again.stdout
    assert not list((tmp_path / "cut").glob("*checkpoint*"))
    assert essence(tmp_path / "cut") == essence(whole)
    for name in ("last.safetensors", "best.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (whole / name).read_bytes()


def test_data_that_changed_between_start_and_resume_is_refused(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name, rows in (("train", 300), ("dev", 20)):
        lines = [f"{i}\tall dogs are wet\tsome dogs are wet {i}\t{('not_' * (i % 2))}entailment" for i in range(rows)]
        (data / f"{name}.tsv").write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *lines]) + "\n")
    arguments = [o for o in SMALL if not o.startswith("task")]
    arguments += ["task=rte", "task.data_dir=data", "task.max_length=32", "train.epochs=40"]
    process = subprocess.Popen(
        [python(), ROOT / "run.py", *arguments, "tracker=jsonl", "run_dir=cut"], cwd=tmp_path,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not (tmp_path / "cut" / "metrics.jsonl").exists() or not (tmp_path / "cut" / "metrics.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    process.wait(timeout=60)
    text = (data / "train.tsv").read_text()
    (data / "train.tsv").write_text(text.replace("some dogs are wet 7\t", "some dogs are dry 7\t"))
    done = run(*arguments, "tracker=jsonl", "run_dir=cut", cwd=tmp_path)
    assert done.returncode == 2 and "is of another run: it differs in data" in done.stderr


def test_a_second_process_on_one_run_directory_is_refused(tmp_path):
    from increlora.glue.checkpoint import exclusive

    with exclusive(tmp_path / "here"):
        done = run(*SMALL, "tracker=jsonl", "run_dir=here", cwd=tmp_path)
    assert done.returncode == 75 and "another process is running in here" in done.stderr


def test_a_disk_that_is_full_ends_the_run_in_two_lines(tmp_path):
    limit = 30_000  # bytes per file: enough for the record, not for a checkpoint
    command = f"trap '' XFSZ; ulimit -f {limit // 1024}; exec {sys.executable} {ROOT / 'run.py'} {' '.join(SMALL)}"
    done = subprocess.run(
        ["bash", "-c", f"{command} tracker=jsonl run_dir=here train.checkpoint_interval=8"], cwd=tmp_path,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("error: cannot write"), done.stderr
    assert done.stderr.count("\n") == 2 and "the same command then continues" in done.stderr
    assert not (tmp_path / "here" / "result.json").exists()
    again = run(*SMALL, "tracker=jsonl", "run_dir=here", cwd=tmp_path)
    assert again.returncode == 0, again.stderr


def test_multirun_works_for_small_sweeps(tmp_path):
    done = run("-m", *SMALL, "seed=1,2", "train.max_steps=32", "tracker=jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    seeds = [json.loads(p.read_text())["run"]["seed"] for p in sorted(tmp_path.rglob("result.json"))]
    assert seeds == [1, 2] and [p.name for p in tmp_path.iterdir()] == ["runs"]


def test_a_job_of_a_multirun_that_cannot_be_done_stops_no_other(tmp_path):
    data = ("task=synthetic_entailment", "task.dev_size=16", "task.train_size=64", "train.batch_size=8")
    given = ("backbone=tiny", *data, "train.max_steps=3", "tracker=jsonl", "train.progress=false")
    done = run("-m", *given, "method=increlora,lora,bitfit", cwd=tmp_path)
    assert done.returncode == 2 and "error in job 0" in done.stderr and "does not fit" in done.stderr
    assert "1 jobs of this multirun were not done: 0 (" in done.stderr.splitlines()[-1]
    results = [json.loads(p.read_text()) for p in tmp_path.rglob("result.json")]
    peaks = {result["run"]["method"]: result["cost"]["peak_memory_mb"] for result in results}
    assert set(peaks) == {"lora", "bitfit"} and peaks["lora"] > 0
    assert peaks["bitfit"] is None  # the peak of this process may be LoRA's
