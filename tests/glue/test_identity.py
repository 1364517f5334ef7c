"""What a run is: the recipe that was composed, what counts, what was read; results of every format are read alike."""

import json
import math
import subprocess
import sys
from collections import defaultdict

import pytest
from conftest import ROOT
from test_results import CONFIG, RUN, made

from increlora import result_files
from increlora.errors import UserError
from increlora.glue import checkpoint, config, identity, results, sweep_plan
from increlora.glue.checkpoint import Checkpoints
from increlora.glue.tasks import GLUE, GLUE_REVISION, Task

RUNS = ROOT / "results" / "runs"
R8 = "recipe=increlora/r8/rte"

# the recipe


@pytest.mark.parametrize(
    ("overrides", "recipe", "folder", "top_h"),
    [
        ([], "increlora/r2/rte", None, 5),
        (["budget=r4"], None, None, None),  # there is none at r4, and Hydra passes it over
        (["~recipe"], None, "recipe=null", None),
        (["recipe=null"], None, "recipe=null", None),
        (["budget=r4", R8], "increlora/r8/rte", "recipe=increlora_r8_rte-", 9),
        (["experiment=null", "compat=null"], "increlora/r2/rte", None, 5),
    ],
)
def test_the_recipe_is_the_one_that_was_composed(overrides, recipe, folder, top_h):
    cfg = config.load(["task=rte", *overrides])
    run = config.identity(cfg, ["task=rte", *overrides])
    assert run["recipe"] == recipe and cfg.method.top_h == top_h  # rte's own number of matrices, or the default
    parts = config.run_directory(cfg, run).parts[5:-1]
    assert len(parts) == bool(folder) and (not folder or parts[0].startswith(folder))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["recipe=increlora/r3/rte"], "there is no recipe 'increlora/r3/rte' in configs/recipe"),
        (["budget=r4", "recipe=increlora/r4/rte"], "there is no recipe 'increlora/r4/rte'"),
        (["recipe=[increlora/r8/rte]"], "is not the name of one recipe"),
        (["task=null"], "a group takes the name of one of its choices"),
        (["method._target_=baselines.lora.LoRA"], "its results would pass for those of another class"),
        (["method.name=lora"], "method=increlora has the name 'lora', by which its results would be known"),
    ],
)
def test_what_would_be_recorded_wrongly_is_refused(overrides, said):
    with pytest.raises(UserError) as error:
        config.load(["task=rte", *overrides])
    assert said in str(error.value) and str(error.value).count("\n") <= 1


def test_run_py_records_it_and_finds_the_run_again_whatever_is_said_of_it(tmp_path):
    def run(*overrides: str) -> subprocess.CompletedProcess:
        small = ["backbone=tiny", "task=synthetic_entailment", "task.train_size=100", "task.dev_size=20", "method=lora"]
        small += ["train.max_steps=2", "train.progress=false", "tracker=jsonl"]
        return subprocess.run(
            [sys.executable, ROOT / "run.py", *small, *overrides], capture_output=True, text=True, cwd=tmp_path
        )

    first = run("recipe=null", "device=cpu")
    assert first.returncode == 0, first.stderr
    (path,) = tmp_path.rglob("result.json")
    result = json.loads(path.read_text())
    assert result["format"] == 3 and result["run"]["recipe"] is None and "recipe=null" in result["run"]["overrides"]
    assert set(result["inputs"]) == {"data"}  # random weights: the configuration says all
    again = run("~recipe", "settings_from='a, comma'", "device=auto")
    assert again.returncode == 0 and "this run was finished before" in again.stdout, again.stderr


# what counts

SAME = [
    {"settings_from": "other words, with a comma"},
    {"method": {**CONFIG["method"], "_target_": "moved.to.Here"}},
    {"train": {"epochs": 5, "device": "cuda"}},
]


@pytest.mark.parametrize("changes", SAME, ids=lambda changes: next(iter(changes)))
def test_words_class_paths_and_devices_make_no_run_another_one(tmp_path, changes):
    results.write(tmp_path, made())
    assert results.stored(tmp_path, CONFIG | changes)["status"] == "finished"
    Checkpoints(tmp_path, identity.of_checkpoint(CONFIG, {"data": "abc"}, 1)).save({"step": 1})
    assert Checkpoints(tmp_path, identity.of_checkpoint(CONFIG | changes, {"data": "abc"}, 1)).load() == {"step": 1}


def test_any_other_key_does():
    assert identity.differences(CONFIG, CONFIG | {"train": {"epochs": 5, "precision": "bf16"}}) == ["train.precision"]
    assert identity.differences({"a": {"b": {"_target_": 1, "c": 1}}}, {"a": {"b": {"c": 2}}}) == ["a.b.c"]


def test_a_directory_is_not_named_by_words():
    cfg = config.load(["task=rte"])
    said = config.identity(cfg, ["settings_from='a, b'", "hydra/job_logging=default", "train.epochs=3"])
    assert said["overrides"] == ["train.epochs=3"]


def test_a_sweep_runs_once_what_differs_in_words_only():
    blocks = [{"seed": 1, "settings_from": words} for words in ("one", "two")]
    assert len(sweep_plan.expand({"runs": blocks}, {}, {})) == 1
    needing = {"seed": 1, "settings_from": "three", "x": {"run_with": {"method": "lora"}}}
    need, run = sweep_plan.expand({"runs": [{"seed": 1, "settings_from": "one", "method": "lora"}, needing]}, {}, {})
    assert sweep_plan.final(run, "x") == need.directory


def test_a_known_result_of_the_same_data_is_found_wherever_it_lies(tmp_path, monkeypatch):
    path = next(
        RUNS.glob("minilm/r2/increlora/stsb/experiment=study_c,method.advance_learning=True*/seed47.json")
    )  # named by words too
    known = result_files.read(path)
    run, words = known["run"], ["settings_from='other words'"]
    overrides = [*(f"{key}={run[key]}" for key in identity.KEYS), *run["overrides"], *words]
    asked = sweep_plan.Run({}, overrides=overrides, directory=tmp_path / "nowhere")
    assert sweep_plan.find_result(asked, RUNS) is None  # asked for the hub's data; it was local files
    monkeypatch.setattr(Task, "inputs", lambda _: {"data": known["data"]["fingerprint"]})
    sweep_plan._inputs.cache_clear()  # a process sees one state of its data
    assert sweep_plan.find_result(asked, RUNS)["run"] == run
    asked.overrides = [*overrides, "train.epochs=6"]
    assert sweep_plan.find_result(asked, RUNS) is None


# what was read


class Reading:
    def __init__(self, **digests: str):
        self.digests = digests

    def inputs(self) -> dict[str, str]:
        return self.digests


def test_every_part_tells_what_it_reads_and_an_unknown_name_is_said_as_it_is(tmp_path):
    told = identity.inputs(Reading(data="abc"), Reading(base="b"), Reading(teacher="t"))
    assert told == {"data": "abc", "base": "b", "teacher": "t"}
    results.write(tmp_path, made() | {"inputs": told})
    assert results.stored(tmp_path, CONFIG, lambda: {"teacher": "t"})
    with pytest.raises(UserError, match="is the result of a run with other pretrained weights and teacher than"):
        results.stored(tmp_path, CONFIG, lambda: {"base": "c", "teacher": "u"})


def test_a_task_tells_what_it_loaded_and_before_where_the_hub_has_it(tmp_path):
    described = {"fields": ["text"], "labels": ["no", "yes"], "metrics": ["accuracy"], "primary": "accuracy"}
    assert Task("t", max_length=8, subset="t", **described).inputs() == {"source": f"{GLUE}@{GLUE_REVISION}"}
    assert Task("t", max_length=8, **described).inputs() == {}
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text("text\tlabel\na\tno\nb\tyes\n")
    local = Task("t", max_length=8, data_dir=str(tmp_path), **described)
    before = local.inputs()
    (tmp_path / "dev.tsv").write_text("text\tlabel\na\tyes\n")
    assert local.inputs() == before != Task("t", max_length=8, data_dir=str(tmp_path), **described).inputs()


# formats


def old(**run) -> dict:
    """A result of format 1, as the committed ones are."""
    return {key: value for key, value in made().items() if key not in ("format", "inputs")} | {"run": RUN | run}


def written(path, result):
    path.write_text(json.dumps(result))
    return path


@pytest.mark.parametrize(
    ("overrides", "recipe"),
    [(["train.epochs=3"], "increlora/r2/rte"), (["~recipe"], None), ([R8], "increlora/r8/rte")],
)
def test_format_1_is_read_as_todays(tmp_path, overrides, recipe):
    words = "settings_from='figure 4, not tuned'"
    path = written(tmp_path / "result.json", old(recipe="increlora/r2/rte", overrides=[*overrides, words]))
    result = result_files.read(path)
    assert result["format"] == 2 and result["inputs"] == {"data": "abc"}
    assert result["run"]["overrides"] == overrides and result["run"]["recipe"] == recipe


def test_a_later_format_is_refused(tmp_path):
    for number in (4, "3", None):
        with pytest.raises(UserError, match=f"is of result format {number}, this code reads 1 to 3"):
            result_files.read(written(tmp_path / "result.json", made() | {"format": number}))


def test_parts_of_another_kind_are_refused(tmp_path):
    for broken in ({"run": 3}, {"data": []}, {"scores": [1]}, {"curve": [1]}):
        with pytest.raises(UserError, match="is not the result of a run"):
            result_files.read(written(tmp_path / "result.json", old() | broken))


def strict(text: str):
    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_what_is_not_a_number_is_null_in_the_file_and_not_a_number_for_readers(tmp_path):
    result = made()
    for scores in (result["curve"][-1]["scores"], result["scores"]["last"]["metrics"]):
        scores["dev"]["loss"] = math.nan
    path = results.write(tmp_path, result)
    assert strict(path.read_text())["curve"][-1]["scores"]["dev"]["loss"] is None
    again = result_files.read(path)
    assert math.isnan(again["curve"][-1]["scores"]["dev"]["loss"]) and "best" in results.summary(again)
    assert math.isnan(again["scores"]["last"]["metrics"]["dev"]["loss"])


def test_a_checkpoint_keeps_what_json_has_no_word_for(tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint.write(path, {"losses": [math.nan, math.inf, -math.inf, 1.5]})
    with checkpoint.safe_open(path, "pt") as file:
        strict(file.metadata()["increlora"])
    nan, *others = checkpoint.read(path)["losses"]
    assert math.isnan(nan) and others == [math.inf, -math.inf, 1.5]


def lacks(stored: dict, key: str) -> bool:
    first, _, rest = key.partition(".")
    return first not in stored or (bool(rest) and lacks(stored[first], rest))


def test_committed_results_are_the_runs_that_their_command_lines_compose_today():
    """But for keys that came into being after them."""
    runs, alike = result_files.load_runs(RUNS), defaultdict(list)
    for result in runs:
        names = [f"{key}={result['run'][key]}" for key in identity.KEYS if key != "seed"]
        rest = [o for o in result["run"]["overrides"] if not o.startswith("train.learning_rate=")]
        alike[*names, *rest].append(result)
    for overrides, found in alike.items():
        cfg = config.load(overrides)
        for result in found:
            cfg.seed, cfg.train.learning_rate = result["run"]["seed"], result["config"]["train"]["learning_rate"]
            composed = config.identity(cfg, result["run"]["overrides"])
            assert composed | {"settings_from": ""} == result["run"] | {"settings_from": ""}
            different = identity.differences(result["config"], config.resolved(cfg))
            assert all(lacks(result["config"], key) for key in different), different
    assert len(runs) >= 268
