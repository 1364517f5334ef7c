"""Every method x task x budget composes; every recipe has real keys, builds, and fits the steps it asks for."""

import pytest
from conftest import ROOT

from baselines.adalora import AdaLoRA
from increlora.algorithm import IncreLoRA
from increlora.glue import config

CONFIGS = ROOT / "configs"
METHODS, TASKS, BUDGETS = (
    sorted(path.stem for path in (CONFIGS / group).glob("*.yaml")) for group in ("method", "task", "budget")
)
GLUE = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
GRID = (3e-5, 5e-5, 8e-5, 1e-4, 3e-4, 5e-4, 8e-4, 1e-3)
MATRICES = 72  # of DeBERTaV3-base


def composed(method: str, budget: str, task: str):
    return config.load([f"method={method}", f"budget={budget}", f"task={task}"])


def test_recipes_are_there_for_every_method_and_glue_task_at_r2_and_r8_and_nowhere_else():
    paths = {
        path.relative_to(CONFIGS / "recipe").with_suffix("").parts for path in (CONFIGS / "recipe").rglob("*.yaml")
    }
    wanted = {(method, budget, task) for method in METHODS for budget in ("r2", "r8") for task in GLUE}
    assert paths == wanted | {("common", task) for task in GLUE}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("method", METHODS)
def test_every_task_composes_and_builds(method, budget):
    for task in TASKS:
        cfg = composed(method, budget, task)
        config.resolved(cfg)
        for part in ("method", "train", "task"):
            config.build(cfg[part])  # refuses a key that its class does not have
        expected = f"{method}/{budget}/{task}" if budget in ("r2", "r8") and task in GLUE else None
        assert config.identity(cfg, [])["recipe"] == expected
        assert (cfg.settings_from == "defaults of this repository") == (expected is None)
        check(method, cfg)


def check(method: str, cfg) -> None:
    """Steps leave room for the schedule of ranks, and unpublished learning rates come from the grid."""
    built = config.build(cfg.method)
    if cfg.settings_from != "defaults of this repository":
        total_steps = config.build(cfg.train).total_steps(cfg.task.train_examples)
        if isinstance(built, IncreLoRA):
            built.schedule(MATRICES, total_steps)
        if isinstance(built, AdaLoRA):
            built.schedule(total_steps)
    if "papers' grid" in cfg.settings_from:
        assert cfg.train.learning_rate in GRID
    assert built.name == method


# METHOD, AdaLoRA's table 8: learning rate, epochs, orth weight, t_i, dT, t_f, alpha
ADALORA = {
    "mnli": (5e-4, 7, 0.1, 8000, 100, 50000, 16),
    "rte": (1.2e-3, 50, 0.3, 600, 1, 1800, 32),
    "qnli": (1.2e-3, 5, 0.1, 2000, 100, 8000, 32),
    "mrpc": (1e-3, 30, 0.1, 600, 1, 1800, 32),
    "qqp": (5e-4, 5, 0.1, 8000, 100, 25000, 16),
    "sst2": (8e-4, 24, 0.1, 6000, 100, 22000, 16),
    "cola": (5e-4, 25, 0.5, 800, 10, 3500, 32),
    "stsb": (2.2e-3, 25, 0.1, 800, 10, 2000, 32),
}


@pytest.mark.parametrize("budget", ["r2", "r8"])
@pytest.mark.parametrize("task", GLUE)
def test_adalora_recipes_say_what_its_paper_says(task, budget):
    cfg = composed("adalora", budget, task)
    m = cfg.method
    found = (
        cfg.train.learning_rate,
        cfg.train.epochs,
        m.orth_weight,
        m.init_warmup,
        m.interval,
        m.final_steps,
        m.alpha,
    )
    assert found == ADALORA[task] and cfg.train.batch_size == 32
    ours = composed("increlora", budget, task)  # evaluated as often, on the same input
    assert cfg.train.eval_interval == ours.train.eval_interval and cfg.task == ours.task


@pytest.mark.parametrize("task", GLUE)
def test_controls_share_every_setting_with_increlora_but_what_they_control(task):
    own = {"_target_", "name", "init_rank", "pattern", "keyed_by"}
    for budget in ("r2", "r8"):
        ours = config.resolved(composed("increlora", budget, task))
        for method in ("uniform", "random_growth", "permuted_growth", "static_pattern", "shuffled_pattern"):
            theirs = config.resolved(composed(method, budget, task))
            assert theirs["train"] == ours["train"] and theirs["task"] == ours["task"]
            shared = {key: value for key, value in theirs["method"].items() if key not in own}
            assert shared == {key: value for key, value in ours["method"].items() if key not in own}


@pytest.mark.parametrize("task", ["cola", "mnli"])
def test_unpublished_recipes_train_as_long_on_the_same_input_as_increlora(task):
    for method in ("full", "lora", "bitfit", "houlsby", "pfeiffer"):
        for budget in ("r2", "r8"):
            cfg, ours = composed(method, budget, task), composed("increlora", budget, task)
            assert cfg.task == ours.task
            for key in ("epochs", "batch_size", "warmup_steps", "eval_interval", "weight_decay"):
                assert cfg.train[key] == ours.train[key], (method, budget, key)


ABLATIONS = {
    "no_orthogonality": (0, True, True),
    "no_advance_learning": (0.3, False, True),
    "no_restart_warmup": (0.3, True, False),
    "only_orthogonality": (0.3, False, False),
    "only_advance_learning": (0, True, False),
    "only_restart_warmup": (0, False, True),
    "raw_growth": (0, False, False),
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_of_table_2_change_what_their_names_say(name):
    method = config.load(["task=rte", f"experiment={name}"]).method
    assert (method.orth_weight, method.advance_learning, method.restart_warmup) == ABLATIONS[name]
