"""Files that are whole or not there; refusals; a continued run is bit-identical wherever it was cut."""

import copy
import json
import os
import time

import pytest
import torch
from conftest import TINY_KINDS
from naming import naming
from test_loop import TASK, data, increlora, settings

from baselines.adalora import AdaLoRA
from baselines.adapters import Adapters
from baselines.bitfit import BitFit
from baselines.controls import RandomGrowth
from baselines.lora import LoRA
from increlora.errors import Interrupted, UserError
from increlora.glue import checkpoint
from increlora.glue.checkpoint import Checkpoints
from increlora.glue.loop import Training
from increlora.glue.tracker import Tracker
from increlora.method import Method

IDENTITY = {"config": {"train": {"epochs": 3}, "seed": 41}, "data": "abc", "processes": 1}


# files


def test_what_is_written_is_read_back(tmp_path):
    document = {
        "numbers": [1, 2.5, None, True],
        "nested": {"weights": torch.randn(3, 4, dtype=torch.float64), "list": [torch.arange(3), "text"]},
        "shared": torch.zeros(2, 3).t(),
    }
    checkpoint.write(tmp_path / "a.safetensors", document)
    again = checkpoint.read(tmp_path / "a.safetensors")
    assert again["numbers"] == document["numbers"] and again["nested"]["list"][1] == "text"
    assert torch.equal(again["nested"]["weights"], document["nested"]["weights"])
    assert torch.equal(again["nested"]["list"][0], torch.arange(3)) and again["shared"].shape == (3, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def filled(folder) -> Checkpoints:
    """A folder with two checkpoints, of steps 1 and 2."""
    checkpoints = Checkpoints(folder, IDENTITY)
    for step in (1, 2):
        checkpoints.save({"step": step, "weights": torch.full((1000,), float(step))})
    return checkpoints


def test_files_have_the_rights_of_the_umask_and_leave_links_alone(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / ".a.safetensors.tmp").symlink_to(tmp_path / "precious")
    before = os.umask(0o027)
    try:
        checkpoint.write(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="cannot write"), checkpoint.exclusive(run):
        pass
    assert (tmp_path / "precious").read_text() == "precious"


def test_what_a_kill_left_is_removed_by_the_next_session(tmp_path):
    for name in (".checkpoint.safetensors.tmp", ".result.json.17.tmp", ".tmpLucAFa", ".my.tmpl.conf"):
        (tmp_path / name).write_text("half")  # ours, ours, the one of safetensors, somebody else's
    filled(tmp_path)
    with checkpoint.exclusive(tmp_path):
        left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".lock", ".my.tmpl.conf", "checkpoint.safetensors", "previous-checkpoint.safetensors"]


def test_files_of_others_under_our_names_are_neither_overwritten_nor_waited_for(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("precious")
    with pytest.raises(UserError, match=r"is no directory of a run, and its metrics\.jsonl would be overwritten"):
        checkpoint.exclusive(tmp_path).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    (tmp_path / "metrics.jsonl").unlink()
    os.mkfifo(tmp_path / "checkpoint.safetensors")
    with pytest.raises(UserError, match="is no regular file"):
        checkpoint.exclusive(tmp_path).__enter__()


def test_checkpoints_on_a_slow_disk_take_their_share_of_the_time_and_no_more(tiny_deberta, tmp_path, monkeypatch):
    saved = []

    def slow(self, state):
        saved.append(state["progress"]["step"])
        time.sleep(0.6)

    monkeypatch.setattr(Checkpoints, "save", slow)
    given, made, method, tracker = settings(checkpoint_interval=3), data(), increlora(), Tracker()
    method.prepare(tiny_deberta, given.total_steps(len(made.train)))
    tracker.start(tmp_path, {"seed": 41}, {"method": {"kinds": TINY_KINDS}})
    training = Training(tiny_deberta, method, TASK, made, given, tracker, 0, Checkpoints(tmp_path, IDENTITY))
    training.run(None)
    assert saved == [3, 6]  # .6 seconds, 1.2: over the free second and 1 % of some seconds


def test_the_newest_checkpoint_is_loaded_and_the_one_before_is_kept(tmp_path):
    assert Checkpoints(tmp_path, IDENTITY).load() is None
    checkpoints = filled(tmp_path)
    assert checkpoints.load()["step"] == 2
    assert checkpoint.read(tmp_path / "previous-checkpoint.safetensors")["state"]["step"] == 1
    checkpoints.clear()
    assert checkpoints.load() is None


@pytest.mark.parametrize("size", [0, 1, 100, 3000])
def test_a_truncated_checkpoint_is_passed_over_for_the_one_before(tmp_path, size, caplog):
    checkpoints = filled(tmp_path)
    os.truncate(tmp_path / "checkpoint.safetensors", size)
    assert checkpoints.load()["step"] == 1
    assert "truncated or not a checkpoint" in caplog.text and "the previous checkpoint is complete" in caplog.text


def test_another_number_of_threads_is_recorded_and_said(tmp_path, caplog):
    Checkpoints(tmp_path, IDENTITY, threads=[1]).save({"step": 1})
    again = Checkpoints(tmp_path, IDENTITY, threads=[1])
    again.load()
    assert again.threads == [1] and not caplog.text
    other = Checkpoints(tmp_path, IDENTITY, threads=[2])
    other.load()
    assert other.threads == [1, 2] and "this run had 1 threads and goes on with 2" in caplog.text


def test_a_killed_session_leaves_the_best_weights_that_the_checkpoint_knows(tmp_path):
    def session() -> Checkpoints:
        checkpoints = Checkpoints(tmp_path, IDENTITY)
        checkpoints.load()
        return checkpoints

    def kept() -> tuple[int, dict] | None:
        path = tmp_path / "best.safetensors"
        return (checkpoint.read(path)["step"], checkpoint.read(path)["state"]) if path.exists() else None

    first = session()
    first.save({"step": 5})
    first.keep("best", {"score": 0.4}, 8)  # and is killed: the checkpoint knows of none
    second = session()
    assert kept() is None
    second.keep("best", {"score": 0.5}, 11)
    second.save({"step": 20})
    for step in (22, 33):
        second.keep("best", {"score": step}, step)
    third = session()
    assert kept() == (11, {"score": 0.5})
    third.keep("best", {"score": 0.6}, 22)
    third.save({"step": 40})
    session()
    assert kept() == (22, {"score": 0.6})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best.safetensors", "checkpoint.safetensors", "previous-checkpoint.safetensors",
    ]  # fmt: skip


def test_another_kind_of_machine_is_recorded_and_said(tmp_path, caplog):
    Checkpoints(tmp_path, IDENTITY, machines=["NVIDIA H200"]).save({"step": 1})
    other = Checkpoints(tmp_path, IDENTITY, machines=["CPU"])
    other.load()
    assert other.machines == ["NVIDIA H200", "CPU"] and "NVIDIA H200, and goes on with: CPU" in caplog.text


def test_a_kill_between_the_two_renames_leaves_the_one_before(tmp_path):
    checkpoints = filled(tmp_path)
    os.remove(tmp_path / "checkpoint.safetensors")
    assert checkpoints.load()["step"] == 1


def test_no_whole_checkpoint_is_an_error_not_a_new_start(tmp_path):
    checkpoints = filled(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        os.truncate(file, 50)
    with pytest.raises(UserError, match="overwrite=true to start again"):
        checkpoints.load()


def test_another_version_is_refused(tmp_path, monkeypatch):
    checkpoints = filled(tmp_path)
    monkeypatch.setattr(checkpoint, "FORMAT", 7)
    monkeypatch.setattr(checkpoint, "READABLE", (7,))
    with pytest.raises(UserError, match="is of checkpoint format 3, this version reads 7"):
        checkpoints.load()


def test_another_configuration_data_or_number_of_processes_is_refused(tmp_path):
    for changed, said in [
        ({"config": {"train": {"epochs": 4}, "seed": 41}}, "config.train.epochs"),
        ({"data": "abd"}, "differs in data"),
        ({"processes": 2}, "differs in processes"),
    ]:
        with naming((changed, said)):
            filled(tmp_path)
            with pytest.raises(UserError, match=said):
                Checkpoints(tmp_path, IDENTITY | changed).load()


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    checkpoints = filled(tmp_path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*No space left on device"):
        checkpoints.save({"step": 3})
    assert checkpoints.load()["step"] == 2


def test_a_second_process_on_one_folder_is_refused(tmp_path):
    refused = pytest.raises(UserError, match="another process is running in")
    with checkpoint.exclusive(tmp_path / "run"), refused, checkpoint.exclusive(tmp_path / "run"):
        pass
    with checkpoint.exclusive(tmp_path / "run"):
        pass


def test_a_run_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"), checkpoint.exclusive(tmp_path / "file" / "run"):
        pass


# runs


class Cut(Training):
    """A run that is stopped, as by SIGTERM, after a given number of batches."""

    after = 0

    def _step(self, indices, stop):
        report = super()._step(indices, stop)
        report.stop = self.progress.position == self.after
        return report


def training(model, method, folder, kind=Training, **changes):
    given, made = settings(checkpoint_interval=4, **changes), data()
    method.prepare(model, given.total_steps(len(made.train)))
    checkpoints, tracker = Checkpoints(folder, IDENTITY), Tracker()
    state = checkpoints.load()
    tracker.start(folder, {"seed": 41}, {"method": {"kinds": TINY_KINDS}}, state and state["tracker"])
    return kind(model, method, TASK, made, given, tracker, 0, checkpoints), state


def essence(outcome, folder) -> tuple:
    """All of an outcome that is not a time, and the final weights."""
    curve = [{k: v for k, v in vars(e).items() if k != "seconds"} for e in outcome.curve]
    last = checkpoint.read(folder / "last.safetensors")["state"]
    best = checkpoint.read(folder / "best.safetensors")["state"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return (
        json.dumps(curve, sort_keys=True), outcome.allocations, outcome.skipped_steps, outcome.cost["tokens"],
        {n: t.tolist() for n, t in last["weights"].items()}, {n: t.tolist() for n, t in best["weights"].items()},
        [{k: v for k, v in line.items() if k != "seconds"} for line in lines],
    )  # fmt: skip


METHODS = {
    "increlora": lambda: increlora(dropout=0.1),
    "raw growth": lambda: increlora(advance_learning=False, restart_warmup=False, orth_weight=0.0),
    "full": Method,
    "adalora": lambda: AdaLoRA(kinds=TINY_KINDS, target_rank=2, init_warmup=3, interval=2, final_steps=12),
    "lora": lambda: LoRA(kinds=TINY_KINDS, rank=2),
    "random growth": lambda: RandomGrowth(kinds=TINY_KINDS, target_rank=2, top_h=5, interval=4, init_warmup=4),
    "houlsby": lambda: Adapters(kinds=TINY_KINDS, matrices=["attention_output", "output"], bottleneck=4),
    "bitfit": lambda: BitFit(kinds=TINY_KINDS),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_cut_anywhere_ends_bit_identically(tiny_deberta, tmp_path, method):
    tiny_deberta.config.hidden_dropout_prob = 0.1  # random numbers are drawn, so their state must be kept
    for module in tiny_deberta.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    whole, _ = training(copy.deepcopy(tiny_deberta), METHODS[method](), tmp_path / "whole")
    expected = essence(whole.run(None), tmp_path / "whole")
    # growth happens within batches 9, 13 and 17
    for cuts in ([1], [8, 9], [10, 17, 29]) if method == "increlora" else ([9, 16],):
        folder = tmp_path / str(cuts)
        for cut in cuts:
            part, state = training(copy.deepcopy(tiny_deberta), METHODS[method](), folder, Cut)
            part.after = cut
            with pytest.raises(Interrupted, match="the same command continues from there"):
                part.run(state)
        rest, state = training(copy.deepcopy(tiny_deberta), METHODS[method](), folder)
        torch.manual_seed(999)  # whatever the new process drew before
        assert essence(rest.run(state), folder) == expected


def test_a_run_killed_between_checkpoints_redoes_the_steps_identically(tiny_deberta, tmp_path):
    whole, _ = training(copy.deepcopy(tiny_deberta), increlora(), tmp_path / "whole")
    expected = essence(whole.run(None), tmp_path / "whole")

    class Killed(Cut):
        def _save(self):
            if self.progress.position != self.after:  # SIGKILL: no checkpoint at the end
                super()._save()

    part, state = training(copy.deepcopy(tiny_deberta), increlora(), tmp_path / "cut", Killed)
    part.after = 15
    with pytest.raises(Interrupted):
        part.run(state)
    rest, state = training(copy.deepcopy(tiny_deberta), increlora(), tmp_path / "cut")
    assert state["progress"]["step"] == 12
    assert essence(rest.run(state), tmp_path / "cut") == expected


def test_best_and_last_weights_give_the_models_back(tiny_deberta, tmp_path):
    fresh = copy.deepcopy(tiny_deberta)
    run, _ = training(tiny_deberta, increlora(), tmp_path)
    outcome = run.run(None)
    method = increlora()
    method.prepare(fresh, 30)
    best = checkpoint.read(tmp_path / "best.safetensors")["state"]
    checkpoint.load_model_state(fresh, method, best)
    assert method.ranks() == outcome.best("dev").ranks
    from increlora.glue.evaluate import evaluate

    assert evaluate(fresh, TASK, data(), settings()) == outcome.best("dev").scores
    assert os.path.getsize(tmp_path / "best.safetensors") < 100_000


def test_weights_of_another_model_are_refused(tiny_deberta, tmp_path):
    method = increlora()
    method.prepare(tiny_deberta, 30)
    state = {"method": method.state_dict(), "weights": {"nowhere": torch.zeros(1)}}
    with pytest.raises(UserError, match="of another model: 8 tensors do not fit or are absent"):
        checkpoint.load_model_state(tiny_deberta, method, state)
