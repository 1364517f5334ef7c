"""Files that changed after they were written: every one is refused, or read with the same content."""

import json
import random

import pytest
from conftest import ROOT
from finished_runs import SYNTHETIC, finished

from increlora import result_files
from increlora.errors import UserError
from increlora.glue import checkpoint, finished_run

FLIPS = 200


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("run"), "backbone=tiny", *SYNTHETIC, "method=increlora")


def test_a_flipped_bit_or_a_lost_end_is_refused_or_changes_nothing(run_dir, tmp_path):
    draw = random.Random(0)
    readers = {"result.json": result_files.read, "best.safetensors": checkpoint.read}
    outcomes = {}
    for name, read in readers.items():
        whole, path = (run_dir / name).read_bytes(), tmp_path / name
        meant = repr(read(run_dir / name))
        for number in range(FLIPS // len(readers)):
            damaged = bytearray(whole)
            if number % 4:
                damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
            else:
                del damaged[draw.randrange(len(whole)) :]
            path.write_bytes(damaged)
            try:
                outcome = "the same" if repr(read(path)) == meant else f"another content: byte flips in {name}"
            except UserError:
                outcome = "refused"
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
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
