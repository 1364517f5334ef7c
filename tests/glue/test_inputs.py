"""What a run reads is part of what it is: other data, weights or pattern under the same name are refused."""

import json
import signal
import subprocess

import pytest
from finished_runs import TRAINING, base_model, finished

from increlora import result_files
from increlora.errors import Interrupted, UserError
from increlora.glue import checkpoint, config, finished_run, machine, results, sweep_plan
from increlora.streams import stream

SETTINGS = ["backbone=bert_base", "task=rte", "task.max_length=24", "method=lora", "budget=r2", "train.epochs=1"]


def write_data(folder, flipped: bool) -> None:
    folder.mkdir(exist_ok=True)
    for name, rows in (("train", 60), ("dev", 20)):
        lines = [f"{i}\tdogs are wet\tcats {i}\t{('not_' * ((i + flipped) % 2))}entailment" for i in range(rows)]
        (folder / f"{name}.tsv").write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *lines]) + "\n")


@pytest.fixture
def files(tmp_path):
    """Weights A and B of equal shape, and the arguments of a run on A."""
    from safetensors.torch import load_file, save_file

    for name in "AB":
        base_model("bert_base", tmp_path / name)
    file = tmp_path / "B" / "model.safetensors"
    tensors = load_file(file)
    noise = {key: t + 0.1 * t.new_empty(t.shape).normal_(generator=stream(1, key)) for key, t in tensors.items()}
    save_file(noise, file, metadata={"format": "pt"})
    write_data(tmp_path / "data", flipped=False)
    return [*SETTINGS, f"task.data_dir={tmp_path / 'data'}", f"backbone.path={tmp_path / 'A'}"]


def found(run_dir, arguments):
    """What run.py finds of a finished run."""
    cfg = config.load([*TRAINING, *arguments])
    config._task.cache_clear()  # a process sees one state of its data, this one sees several
    return results.stored(run_dir, config.resolved(cfg), lambda: config.inputs(cfg))


def test_a_finished_run_is_not_returned_for_other_data_or_weights(files, tmp_path):
    run_dir = finished(tmp_path / "run", *files)
    assert found(run_dir, files)["status"] == "finished"
    with pytest.raises(UserError, match="of a run with other pretrained weights than those given"):
        found(run_dir, [*files, f"backbone.path={tmp_path / 'B'}"])
    for name, said in (("config.json", "config.json"), ("tokenizer.json", "tokenizer")):
        file = tmp_path / "A" / name
        text = file.read_text()
        file.write_text(text + " ")
        with pytest.raises(UserError, match=f"of a run with other {said} than those given"):
            found(run_dir, files)
        file.write_text(text)
    for left_out, said in ((-2, r"data \(task.data_dir\)"), (-1, r"pretrained weights \(backbone.path\)")):
        rest = [argument for argument in files if argument is not files[left_out]]  # those of the hub
        with pytest.raises(UserError, match=f"of a run with other {said} than those given"):
            found(run_dir, rest)
    write_data(tmp_path / "data", flipped=True)
    with pytest.raises(UserError, match="of a run with other data than those given"):
        found(run_dir, files)


def test_an_adapter_is_not_put_on_other_weights(files, tmp_path):
    run_dir = finished(tmp_path / "run", *files)
    assert finished_run.load(run_dir, "last", files[-1:]).result["status"] == "finished"
    with pytest.raises(UserError, match="was trained on other pretrained weights"):
        finished_run.load(run_dir, "last", [f"backbone.path={tmp_path / 'B'}"])


def stop_at(monkeypatch, step: int) -> None:
    from increlora.glue.loop import Training

    def stopping(self, *arguments):
        report = before(self, *arguments)
        if self.progress.step == step:
            self._interrupt(signal.SIGTERM)
        return report

    before = Training._step
    monkeypatch.setattr(Training, "_step", stopping)


def test_a_run_is_not_continued_on_other_weights(files, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(patch, 2)
        finished(tmp_path / "run", *files)
    with pytest.raises(UserError, match="is of another run: it differs in base"):
        finished(tmp_path / "run", *files, f"backbone.path={tmp_path / 'B'}")
    finished(tmp_path / "run", *files)


def test_a_pattern_that_was_made_anew_is_another(tmp_path):
    def write(ranks):
        text = json.dumps({"status": "finished", "ranks": {"last": ranks}})
        (tmp_path / "pattern.json").write_text(text)

    write({"a": 1, "b": 3})
    arguments = [
        "method=static_pattern",
        "backbone=tiny",
        "task=synthetic_entailment",
        f"method.pattern={tmp_path / 'pattern.json'}",
    ]
    before = config.inputs(config.load(arguments))
    write({"b": 3, "a": 1})
    assert config.inputs(config.load(arguments)) == before and set(before) == {"pattern"}
    write({"a": 2, "b": 2})
    assert config.inputs(config.load(arguments)) != before


def test_running_again_leaves_no_result_beside_weights_of_another_training(files, tmp_path, monkeypatch):
    run_dir = finished(tmp_path / "run", *files)
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match=r"\(without overwrite=true\)"):
        stop_at(patch, 2)
        finished(run_dir, *files, "overwrite=true")
    assert sorted(p.name for p in run_dir.glob("*.[js]*")) == ["checkpoint.safetensors", "metrics.jsonl"]
    finished(run_dir, *files)  # goes on from the checkpoint
    assert result_files.read(run_dir / "result.json")["curve"][-1]["step"] == 3


def test_a_result_names_every_commit_and_machine_that_it_ran_on(files, tmp_path, monkeypatch):
    commits = iter(["c0ffee", "decade"])

    def state(device):
        commit = next(commits)
        return {"commit": commit, "dirty": False, "threads": 1, "gpu": "H200" if commit == "c0ffee" else None}

    monkeypatch.setattr(machine, "code_state", state)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(patch, 2)
        finished(tmp_path / "run", *files)
    run_dir = finished(tmp_path / "run", *files)
    code = result_files.read(run_dir / "result.json")["code"]
    assert code["commits"] == ["c0ffee", "decade"] and code["machines_of_sessions"] == ["H200", "CPU"]
    assert checkpoint.read(run_dir / "last.safetensors")["identity"]["base"] is not None


def test_a_known_result_of_other_data_is_not_taken(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [*TRAINING, *files]
    cfg = config.load(arguments)
    run = sweep_plan.Run({}, overrides=arguments, directory=config.run_directory(cfg, config.identity(cfg, arguments)))
    known = (tmp_path / "known" / run.directory.relative_to("runs")).with_suffix(".json")
    known.parent.mkdir(parents=True)
    (finished(tmp_path / "elsewhere", *files) / "result.json").rename(known)
    assert sweep_plan.find_result(run, tmp_path / "known")["status"] == "finished"
    write_data(tmp_path / "data", flipped=True)
    config._task.cache_clear()
    assert sweep_plan.find_result(run, tmp_path / "known") is None


def test_a_commit_is_known_only_of_the_codes_own_repository(tmp_path, monkeypatch):
    theirs = tmp_path / "theirs"
    (theirs / "copy" / "increlora").mkdir(parents=True)
    (theirs / "increlora").mkdir()
    for words in ("init", "-c user.name=a -c user.email=a@b commit --allow-empty --message=x"):
        subprocess.run(["git", *words.split()], cwd=theirs, check=True, capture_output=True)
    monkeypatch.setattr(machine, "ROOT", theirs)
    own = machine.code_state("cpu")["commit"]
    assert len(own) == 40
    monkeypatch.setenv("GIT_DIR", str(tmp_path))
    assert machine.code_state("cpu")["commit"] == own
    monkeypatch.setattr(machine, "ROOT", theirs / "copy")
    assert machine.code_state("cpu")["commit"] is None
