"""The command line: what composes, what a run is called, and every refusal in two lines."""

import re

import pytest
import yaml
from conftest import ROOT
from naming import naming

from increlora.errors import UserError
from increlora.glue import config

CONFIGS = ROOT / "configs"


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def test_every_choice_composes_and_resolves():
    """Methods and tasks do in tests/glue/test_recipes.py."""
    for group in ("backbone", "budget", "tracker", "compat", "experiment"):
        for choice in choices(group):
            with naming(f"{group}={choice}"):
                given = [f"{group}={choice}", *(["backbone=tiny"] if group != "backbone" else [])]
                config.resolved(config.load(given))


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


REFUSED = [
    (["task=rtee"], "Could not find 'task/rtee'\nthere is: cola, mnli"),
    (["method=foo"], "there is: "),
    (["backbone=foo"], "deberta_v3_base"),
    (["budget=r3"], "r1, r12, r16, r2, r24, r4, r8"),
    (["method.rank=3"], "Could not override 'method.rank'"),
    (["train.learning_rat=1"], "`python run.py --cfg job` shows every key"),
    (["task=a=b=c"], "'task=a=b=c' cannot be read: other characters than letters"),
    (["run_dir=runs/a=b/c"], "need quotes"),
    (["task.data_dir=~/glue"], "need quotes"),
    (["overwrite=no"], "overwrite=no must be true or false"),
]


def test_what_does_not_exist_is_refused_in_two_lines():
    for overrides, said in REFUSED:
        with naming(overrides):
            with pytest.raises(UserError) as error:
                config.load(overrides)
            assert re.search(said, str(error.value)) and str(error.value).count("\n") <= 1


def test_a_key_that_the_class_does_not_have_is_refused():
    with pytest.raises(UserError, match=r"IncreLoRA has no key 'speed'.* leave it out with ~method.speed$"):
        config.build(config.load(["+method.speed=1"]).method)


def test_what_is_no_regular_expression_is_refused():
    for override in ("backbone.head='('", "backbone.kinds.query=5"):
        with pytest.raises(UserError, match="must be a regular expression"):
            config.build(config.load(["task=rte", override]).backbone)


def test_of_one_key_the_last_override_names_the_run():
    assert config.counted_overrides(["train.max_steps=9", "+train.max_steps=2"]) == ["+train.max_steps=2"]


def test_a_home_folder_in_quotes_is_found(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    cfg = config.load(["run_dir='~/runs/a=b'"])
    assert str(config.run_directory(cfg, config.identity(cfg, []))) == "/home/me/runs/a=b"
    for value, said in (("5", "run_dir=5: a path must be text"), ("'~nobody-here/x'", "run_dir=~nobody-here/x: ")):
        cfg = config.load([f"run_dir={value}"])
        with pytest.raises(UserError, match=said):
            config.run_directory(cfg, config.identity(cfg, []))


def test_a_refusal_of_the_class_itself_comes_through():
    with pytest.raises(UserError, match=r"must divide train\.batch_size"):
        config.build(config.load(["train.accumulation=3"]).train)


def test_every_yaml_opens_with_the_command_it_answers_or_its_package():
    for path in CONFIGS.rglob("*.yaml"):
        assert path.read_text().startswith("#"), path
        yaml.safe_load(path.read_text())


def test_arguments_are_named_as_keys_where_a_configuration_gave_them():
    from baselines.lora import LoRA

    with pytest.raises(UserError, match=r"^`rank` must be at least 1, it is 0$"):
        LoRA(rank=0)
    cfg = config.load(["method=lora", "method.rank=0", "tracker.mode=bogus", "train.max_steps=0"])
    for part, said in (("method", "method.rank must"), ("tracker", "tracker.mode must"), ("train", "train.max_steps")):
        with pytest.raises(UserError, match=f"^{said}"):
            config.build(cfg[part])


def test_what_a_built_object_refuses_later_is_named_so_too_and_a_mapping_by_the_key_that_gives_it():
    cfg = config.load(["task=rte"])
    with pytest.raises(UserError, match=r"^method.top_h and `python run.py` and `total_steps` in backbone.kinds$"):  # noqa: SIM117
        with config.readable_errors(cfg.method):
            raise UserError("`top_h` and `python run.py` and `total_steps` in `kinds`")
