"""Result files: content, atomic writing, refusal of another configuration, the summary a person reads."""

import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_KINDS
from hydra.utils import get_class

from increlora import files, result_files
from increlora.errors import UserError
from increlora.glue import machine, results
from increlora.glue.evaluate import Evaluation
from increlora.glue.loop import Outcome
from increlora.glue.tasks import Split, TaskData

NAMES = ["deberta.encoder.layer.0.attention.self.query_proj", "deberta.encoder.layer.1.output.dense"]
RUN = {"backbone": "tiny", "budget": "r2", "method": "increlora", "task": "rte", "seed": 41, "overrides": []}
CONFIG = {"method": {"name": "increlora", "kinds": TINY_KINDS}, "train": {"epochs": 5}}


def evaluation(step: int, dev: float, holdout: float, ranks: tuple[int, int]) -> Evaluation:
    scores = {"dev": {"accuracy": dev, "score": dev, "loss": 1.0}, "holdout": {"accuracy": holdout, "score": holdout}}
    parameters = {"update": 10 * sum(ranks), "reserve": 5, "head": 3, "total": 1000}
    return Evaluation(step, step / 10, scores, dict(zip(NAMES, ranks, strict=True)), parameters, step * 0.1)


def made() -> dict:
    curve = [evaluation(10, 0.6, 0.7, (1, 1)), evaluation(20, 0.8, 0.5, (1, 2)), evaluation(30, 0.7, 0.7, (1, 3))]
    split = Split("x", [[1]], None, [0])
    data = TaskData(split, {"dev": split, "holdout": split}, "folder", {"train": 9}, "abc", {"train": 0}, {})
    cost = {"steps": 30, "seconds": 3.0, "tokens": 100, "padded_tokens": 5}
    outcome = Outcome("finished", dict.fromkeys(NAMES, 1), curve, [{"step": 15, "added": {}, "scores": {}}], cost, 0)
    return results.build(RUN, CONFIG, data, outcome, machine.code_state("cpu"), {"data": "abc", "base": "b"}, {})


def test_scores_ranks_and_parameters_come_from_one_checkpoint_each():
    result = made()
    assert {name: (s["score"], s["step"]) for name, s in result["scores"].items()} == {
        "best": (0.8, 20),
        "last": (0.7, 30),
        "clean": (0.6, 10),  # chosen on the held-out part, the earliest of equals, scored on dev
    }
    assert [result["ranks"][k][NAMES[1]] for k in ("start", "best", "last", "clean")] == [1, 2, 3, 1]
    assert result["parameters"]["best"]["update"] == 30 and result["parameters"]["last"]["update"] == 40
    assert [point["total_rank"] for point in result["curve"]] == [2, 3, 4]
    assert {"run", "code", "data", "config", "allocations", "cost", "status"} <= set(result)
    assert {"commit", "dirty", "versions", "device"} <= set(result["code"])
    assert result["data"]["fingerprint"] == "abc"


def test_what_is_written_is_read_back_whole(tmp_path):
    result = made()
    path = results.write(tmp_path, result)
    assert result_files.read(path) == json.loads(json.dumps(result))
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]  # no temporary file stays
    assert [run["status"] for run in result_files.load_runs(tmp_path)] == ["finished"]
    del result["allocations"]
    assert result_files.load_runs(tmp_path, without=("allocations",)) == [json.loads(json.dumps(result))]


def test_a_failed_write_leaves_the_old_result(tmp_path):
    results.write(tmp_path, made())
    with pytest.raises(TypeError):
        results.write(tmp_path, made() | {"cost": object()})
    assert results.stored(tmp_path, CONFIG)["cost"]["steps"] == 30


def test_a_result_that_cannot_be_written_is_said_in_words(tmp_path, monkeypatch):
    results.write(tmp_path, made())

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(UserError, match=r"cannot write .*No space left on device"):
        results.write(tmp_path, made())
    assert results.stored(tmp_path, CONFIG)["cost"]["steps"] == 30


def test_a_finished_run_is_found_and_another_configuration_refused(tmp_path):
    assert results.stored(tmp_path, CONFIG) is None
    results.write(tmp_path, made())
    assert results.stored(tmp_path, CONFIG)["scores"]["best"]["score"] == 0.8
    changed = CONFIG | {"train": {"epochs": 6, "max_steps": 3}}
    with pytest.raises(UserError, match=r"differs in train.epochs, train.max_steps\). Run with overwrite=true"):
        results.stored(tmp_path, changed)
    assert results.stored(tmp_path, CONFIG, lambda: {"data": "abc", "base": "b", "pattern": "unknown then"})
    with pytest.raises(UserError, match="of a run with other data and pretrained weights than"):
        results.stored(tmp_path, CONFIG, lambda: {"data": "other", "base": "c"})


def test_a_run_that_is_not_finished_is_said_to_be_so(tmp_path):
    (tmp_path / "checkpoint.safetensors").touch()
    with pytest.raises(UserError, match="the run is not finished; the command that started it continues it"):
        result_files.read(tmp_path / "result.json")


def test_a_broken_result_file_is_named(tmp_path):
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(UserError, match="cannot read the result file"):
        results.stored(tmp_path, CONFIG)


def test_the_summary_shows_scores_ranks_before_and_after_and_padding():
    text = results.summary(made())
    assert "best  score 0.8000 at step 20" in text and "clean score 0.6000 at step 10" in text
    assert "at step 20 (accuracy 0.8000" in text and "; holdout: accuracy" in text  # each split under its name
    assert "1 -> 3" in text and "total rank 2 -> 4" in text and "padding 5.0%" in text


def test_the_classes_that_committed_results_name_are_found_where_they_are_now():
    found = {
        node["_target_"]
        for result in result_files.load_runs(ROOT / "results" / "runs")
        for node in result_files.up_to_date(result["config"]).values()
        if isinstance(node, dict) and "_target_" in node
    }
    assert {"increlora.glue.tasks.Task", "increlora.glue.settings.Settings", "increlora.algorithm.IncreLoRA"} < found
    assert all(get_class(name) for name in found)


def test_a_result_says_what_it_ran_on():
    code = made()["code"]
    assert code["threads"] == torch.get_num_threads() and code["gpu"] is None
    assert code["processor"] in Path("/proc/cpuinfo").read_text()
