"""The command line: what composes, what a run is called, and every refusal in two lines."""

import pytest
import yaml
from conftest import ROOT

from increlora.errors import UserError
from increlora.glue import config

GLUE = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
CONFIGS = ROOT / "configs"


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


@pytest.mark.parametrize("group", ["backbone", "budget", "method", "task", "tracker", "compat", "experiment"])
def test_every_choice_composes_and_resolves(group):
    for choice in choices(group):
        cfg = config.load([f"{group}={choice}", "backbone=tiny"] if group != "backbone" else [f"{group}={choice}"])
        config.resolved(cfg)


@pytest.mark.parametrize("budget", ["r2", "r8"])
@pytest.mark.parametrize("task", GLUE)
def test_every_glue_task_has_a_published_recipe_for_increlora(task, budget):
    cfg = config.load([f"task={task}", f"budget={budget}", "method=increlora"])
    run = config.identity(cfg, [])
    assert run["recipe"] == f"increlora/{budget}/{task}"
    assert cfg.settings_from.startswith("published" if (task, budget) != ("stsb", "r8") else "derived")


# METHOD: learning rate, top_h, dropout, epochs, interval, alpha, weight decay, orth_weight, head dropout, max length
PUBLISHED = {
    ("cola", "r2"): (8e-4, 3, 0, 25, 100, 32, 0, 0.1, 0.1, 64),
    ("cola", "r8"): (1e-3, 3, 0, 25, 100, 32, 0, 0.1, 0.1, 64),
    ("mnli", "r2"): (3.5e-4, 2, 0.2, 9, 1000, 16, 0, 0.1, 0.15, 256),
    ("mnli", "r8"): (5e-4, 18, 0, 7, 1000, 16, 0, 0.1, 0.15, 256),
    ("mrpc", "r2"): (1e-3, 6, 0.3, 30, 100, 32, 0.01, 0.1, 0, 320),
    ("mrpc", "r8"): (1e-3, 10, 0.3, 30, 100, 32, 0.01, 0.1, 0, 320),
    ("qnli", "r2"): (7e-4, 12, 0, 5, 500, 32, 0.01, 0.1, 0.1, 512),
    ("qnli", "r8"): (9e-4, 22, 0, 5, 500, 32, 0.01, 0.1, 0.1, 512),
    ("qqp", "r2"): (4e-4, 3, 0, 7, 1000, 16, 0.01, 0.1, 0.15, 320),
    ("qqp", "r8"): (6e-4, 3, 0, 7, 1000, 16, 0.01, 0.1, 0.15, 320),
    ("rte", "r2"): (1.2e-3, 5, 0, 50, 100, 32, 0.01, 0.3, 0.2, 320),
    ("rte", "r8"): (1.2e-3, 9, 0, 50, 100, 32, 0.01, 0.3, 0.2, 320),
    ("sst2", "r2"): (8e-4, 5, 0.1, 24, 1000, 16, 0.01, 0.1, 0, 128),
    ("sst2", "r8"): (8e-4, 6, 0.3, 24, 1000, 16, 0.01, 0.1, 0, 128),
    ("stsb", "r2"): (2.2e-3, 4, 0, 25, 100, 32, 0.1, 0.3, 0.2, 128),
}


@pytest.mark.parametrize(("task", "budget"), PUBLISHED)
def test_recipes_say_what_the_authors_scripts_say(task, budget):
    cfg = config.load([f"task={task}", f"budget={budget}", "method=increlora"])
    method, train = cfg.method, cfg.train
    found = (train.learning_rate, method.top_h, method.dropout, train.epochs, method.interval, method.alpha)
    found += (train.weight_decay, method.orth_weight, cfg.task.head_dropout, cfg.task.max_length)
    assert found == PUBLISHED[task, budget]
    assert train.warmup_steps == method.init_warmup == method.interval == train.eval_interval
    assert train.batch_size == 32 and method.init_rank == 1 and method.beta1 == method.beta2 == 0.85
    assert method.rank_step == {"r2": 1, "r8": 1 if task == "mnli" else 4}[budget]


def test_every_recipe_path_names_real_groups():
    for path in (CONFIGS / "recipe").glob("*/*/*.yaml"):  # recipe/common/<task>.yaml is shared by several
        method, budget, task = path.relative_to(CONFIGS / "recipe").with_suffix("").parts
        assert method in choices("method") and budget in choices("budget") and task in choices("task"), path
        assert path.read_text().startswith("# @package _global_\n"), path


def test_precedence_command_line_recipe_method():
    assert config.load(["task=mrpc"]).method.dropout == 0.3
    assert config.load(["task=mrpc", "method.dropout=0.1"]).method.dropout == 0.1
    assert config.load(["task=wnli"]).method.dropout == 0.0


def test_identity_names_the_directory_and_leaves_out_what_changes_nothing():
    overrides = ["task=rte", "seed=42", "train.epochs=3", "device=cpu", "task.data_dir=/x", "tracker=jsonl"]
    cfg = config.load(overrides)
    run = config.identity(cfg, overrides)
    assert run["overrides"] == ["train.epochs=3"] and run["seed"] == 42
    expected = "runs/deberta_v3_base/r2/increlora/rte/train.epochs=3/seed42"
    assert str(config.run_directory(cfg, run)) == expected
    assert "data_dir" not in config.resolved(cfg)["task"] and "tracker" not in config.resolved(cfg)


def test_long_or_odd_overrides_give_a_short_distinct_directory():
    cfg = config.load([])
    a, b = ([f"method.kinds.query='.*/{c}'", *(f"train.epochs={i}" for i in range(40))] for c in "ab")
    names = [config.run_directory(cfg, config.identity(cfg, overrides)).parts[5] for overrides in (a, b)]
    assert len(set(names)) == 2 and all(len(name) < 120 and "/" not in name for name in names)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["task=rtee"], "Could not find 'task/rtee'\nthere is: cola, mnli"),
        (["method=foo"], "there is: "),
        (["backbone=foo"], "deberta_v3_base"),
        (["budget=r3"], "r1, r12, r16, r2, r24, r4, r8"),
        (["method.rank=3"], "Could not override 'method.rank'"),
        (["train.learning_rat=1"], "`python run.py --cfg job` shows every key"),
        (["task=a=b=c"], "'task=a=b=c' cannot be read: a value that holds = ,"),
        (["run_dir=runs/a=b/c"], "needs quotes"),
        (["task.data_dir=~/glue"], "needs quotes"),
    ],
)
def test_what_does_not_exist_is_refused_in_two_lines(overrides, said):
    import re

    with pytest.raises(UserError) as error:
        config.load(overrides)
    assert re.search(said, str(error.value)) and str(error.value).count("\n") <= 1


def test_a_key_that_the_class_does_not_have_is_refused():
    with pytest.raises(UserError, match=r"IncreLoRA has no key 'speed'.* leave it out with ~method.speed$"):
        config.build(config.load(["+method.speed=1"]).method)


def test_a_home_folder_in_quotes_is_found(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    cfg = config.load(["run_dir='~/runs/a=b'"])
    assert str(config.run_directory(cfg, config.identity(cfg, []))) == "/home/me/runs/a=b"


def test_a_refusal_of_the_class_itself_comes_through():
    with pytest.raises(UserError, match=r"must divide train\.batch_size"):
        config.build(config.load(["train.accumulation=3"]).train)


def test_every_yaml_opens_with_the_command_it_answers_or_its_package():
    for path in CONFIGS.rglob("*.yaml"):
        assert path.read_text().startswith("#"), path
        yaml.safe_load(path.read_text())
