"""Files that changed after they were written: every one is refused, or read with the same content."""

import json
import math
import os
import random

import pytest
import torch
from conftest import ROOT
from damage import damaged
from finished_runs import SYNTHETIC, finished
from naming import naming

from increlora import result_files
from increlora.errors import UserError
from increlora.glue import checkpoint, finished_run
from increlora.glue.checkpoint import Checkpoints

FLIPS = 200


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("run"), "backbone=tiny", *SYNTHETIC, "method=increlora")


def test_a_flipped_bit_or_a_lost_end_is_refused_or_changes_nothing(run_dir, tmp_path):
    draw = random.Random(0)
    weights = checkpoint.read(run_dir / "best.safetensors")
    same = {"config": {"seed": 41}}
    Checkpoints(run_dir, same).save({"step": 3, **weights["state"]})
    readers = {
        "result.json": result_files.read,
        "best.safetensors": checkpoint.read,
        "checkpoint.safetensors": lambda path: Checkpoints(path.parent, same).load(),  # as a run that continues
    }
    outcomes = {}
    for name, read in readers.items():
        whole, path = (run_dir / name).read_bytes(), tmp_path / name
        meant = repr(read(run_dir / name))
        for number in range(FLIPS // len(readers)):
            path.write_bytes(damaged(whole, number, draw))
            try:
                outcome = "the same" if repr(read(path)) == meant else f"another content: byte flips in {name}"
            except UserError:
                outcome = "refused"
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
    (run_dir / "checkpoint.safetensors").unlink()
    assert set(outcomes) <= {"refused", "the same"} and outcomes["refused"] > 0.8 * FLIPS, outcomes


def test_weights_of_another_run_beside_a_result_are_refused(run_dir, tmp_path):
    for name in ("result.json", "last.safetensors"):
        (tmp_path / name).write_bytes((run_dir / name).read_bytes())
    document = checkpoint.read(run_dir / "last.safetensors")
    document["state"]["weights"] = {k: v + 1e-3 for k, v in document["state"]["weights"].items()}
    checkpoint.write(tmp_path / "last.safetensors", document)  # a whole checkpoint of the same configuration
    with pytest.raises(UserError, match=r"is not the file of weights that result\.json is about"):
        finished_run.load(tmp_path, "last")


def test_a_result_file_builds_no_class_of_strangers(run_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for target in (
        "pathlib.Path",
        "increlora.files.Path",
        "increlora.files.os.system",
        "torch.hub.load",
        "increlora.x",
    ):
        result = json.loads((run_dir / "result.json").read_text())
        result["config"]["task"]["_target_"] = target
        with pytest.raises(UserError, match=r"which is not a class of increlora, baselines") as error:
            finished_run.run_config(result["config"], [])
        assert "trust=PACKAGE" in str(error.value)
    for hidden in ("${oc.create:{_target_:pathlib.PurePath}}", "${oc.env:HOME}"):
        with pytest.raises(UserError, match="has the interpolation"):
            finished_run.run_config(result["config"] | {"task": {"labels": [hidden]}}, [])
    result["config"]["task"]["_target_"] = "collections.OrderedDict"
    assert finished_run.run_config(result["config"], ["trust=collections"]).task._target_ == "collections.OrderedDict"


def test_what_is_no_result_is_named_and_keeps_no_other_out(run_dir, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "result.json").write_bytes((run_dir / "result.json").read_bytes())
    for text in (
        "{}",
        "[]",
        "",
        '"x"',
        "\x00",
        '{"status": "finished"}',
        '{"run": 3}',
        "[" * 10**5,
        '{"a": 1, "a": 1}',
    ):
        (tmp_path / "result.json").write_text(text)
        with pytest.raises(UserError, match=r"is not the result of a run: it has no|cannot read the result file"):
            result_files.load_runs(tmp_path)
        passed_over: list[str] = []
        assert len(result_files.load_runs(tmp_path, passed_over)) == 1
        assert len(passed_over) == 1 and str(tmp_path / "result.json") in passed_over[0]


def test_a_run_that_another_process_finished_meanwhile_is_not_trained_again(run_dir, monkeypatch):
    before = (run_dir / "result.json").read_bytes()
    monkeypatch.setattr("increlora.glue.loop.train", lambda *_: pytest.fail("it trains again"))
    finished(run_dir, "backbone=tiny", *SYNTHETIC, "method=increlora")  # it looked before the result was there
    assert (run_dir / "result.json").read_bytes() == before


def test_a_result_without_what_readers_take_for_granted_and_a_pipe_are_no_results(run_dir, tmp_path):
    right = json.loads((run_dir / "result.json").read_text())
    best = right["scores"]["best"]
    for part, value in (
        ("scores", {"best": best | {"score": "high"}}), ("scores", {"best": {"score": 0.5}}), ("inputs", []),
        ("scores", {"best": best | {"metrics": {"dev": {"accuracy": "high"}}}}), ("cost", {"steps": 3}),
    ):  # fmt: skip
        (tmp_path / "result.json").write_text(json.dumps(result_files.sealed(right | {part: value})))
        with naming((part, value)), pytest.raises(UserError, match="is not the result of a run"):
            result_files.read(tmp_path / "result.json")
    (tmp_path / "result.json").unlink()
    os.mkfifo(tmp_path / "result.json")
    with pytest.raises(UserError, match="is no regular file"):
        result_files.read(tmp_path / "result.json")


def test_outputs_that_are_no_numbers_are_no_predictions(run_dir):
    trained = finished_run.load(run_dir)
    with torch.no_grad():
        for parameter in trained.model.parameters():
            parameter.fill_(math.nan)
    with pytest.raises(UserError, match="the model's outputs are no numbers"):
        trained.logits([("a", "b")])
