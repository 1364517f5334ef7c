"""Every recipe has real keys, says what the papers say, and fits the steps it asks for; other choices compose too."""

import functools

import yaml
from conftest import ROOT
from naming import naming

from baselines.adalora import AdaLoRA
from increlora.algorithm import IncreLoRA
from increlora.glue import config

CONFIGS = ROOT / "configs"
METHODS, TASKS, BUDGETS = (
    sorted(path.stem for path in (CONFIGS / group).glob("*.yaml")) for group in ("method", "task", "budget")
)
GLUE = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
WITH_RECIPES = ("r2", "r8")
CONTROLS = ("uniform", "random_growth", "permuted_growth", "static_pattern", "shuffled_pattern")
PUBLISHED_METHODS = ("increlora", "adalora", "lora", "full", "bitfit", "houlsby", "pfeiffer")
GRID = (3e-5, 5e-5, 8e-5, 1e-4, 3e-4, 5e-4, 8e-4, 1e-3)
MATRICES = 72  # of DeBERTaV3-base


@functools.cache
def composed(method: str, budget: str, task: str):
    """Composed once for all tests of this file, which leave it as it is."""
    return config.load([f"method={method}", f"budget={budget}", f"task={task}"])


def recipes() -> list[tuple[str, str, str]]:
    """Method, budget and task of every recipe."""
    paths = sorted((CONFIGS / "recipe").glob("*/*/*.yaml"))  # recipe/common/<task>.yaml is shared by several
    return [path.relative_to(CONFIGS / "recipe").with_suffix("").parts for path in paths]


def test_a_method_has_recipes_for_every_glue_task_at_r2_and_r8_or_none():
    with_recipes = {method for method, _, _ in recipes()}
    assert {*PUBLISHED_METHODS, *CONTROLS} <= with_recipes <= set(METHODS)
    assert set(recipes()) == {(m, budget, task) for m in with_recipes for budget in WITH_RECIPES for task in GLUE}
    assert {path.stem for path in (CONFIGS / "recipe" / "common").iterdir()} == set(GLUE)
    for path in (CONFIGS / "recipe").glob("*/*/*.yaml"):
        assert path.read_text().startswith("# @package _global_\n"), path


def test_every_recipe_composes_builds_and_is_used():
    """Of the controls one for each budget: the others differ in nothing but the recipe that they take over."""
    for cell in recipes():
        if cell[0] in CONTROLS and cell[2] != "rte":
            continue
        with naming("/".join(cell)):
            cfg = composed(*cell)
            assert_builds(cfg, cell[0])
            assert config.identity(cfg, [])["recipe"] == "/".join(cell)
            assert cfg.settings_from != "defaults of this repository"
            assert_fits_its_steps(cfg)
            if "papers' grid" in cfg.settings_from:
                assert cfg.train.learning_rate in GRID


def test_every_method_composes_and_builds_without_a_recipe():
    """With every task that has none, and at a budget that has none; budgets differ in nothing but their numbers."""
    keys = {budget: sorted(yaml.safe_load((CONFIGS / "budget" / f"{budget}.yaml").read_text())) for budget in BUDGETS}
    assert len(set(map(tuple, keys.values()))) == 1, keys
    without = [task for task in TASKS if task not in GLUE]
    for method, task in [(method, task) for method in METHODS for task in without] + [("increlora", "rte")]:
        with naming(f"{method} on {task}"):
            cfg = composed(method, "r4", task)
            assert_builds(cfg, method)
            assert config.identity(cfg, [])["recipe"] is None
            assert cfg.settings_from == "defaults of this repository"


def assert_builds(cfg, method: str) -> None:
    config.resolved(cfg)
    built = {part: config.build(cfg[part]) for part in ("method", "train", "task")}  # refuses what no class has
    assert built["method"].name == method


def assert_fits_its_steps(cfg) -> None:
    built, total_steps = config.build(cfg.method), config.build(cfg.train).total_steps(cfg.task.train_examples)
    if isinstance(built, IncreLoRA):
        built.schedule(MATRICES, total_steps)
    if isinstance(built, AdaLoRA):
        built.schedule(total_steps)


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


def test_recipes_of_increlora_say_what_the_authors_scripts_say():
    for (task, budget), published in PUBLISHED.items():
        with naming(f"{budget} {task}"):
            cfg = composed("increlora", budget, task)
            method, train = cfg.method, cfg.train
            found = (train.learning_rate, method.top_h, method.dropout, train.epochs, method.interval, method.alpha)
            found += (train.weight_decay, method.orth_weight, cfg.task.head_dropout, cfg.task.max_length)
            assert found == published and cfg.settings_from.startswith("published")
            assert train.warmup_steps == method.init_warmup == method.interval == train.eval_interval
            assert train.batch_size == 32 and method.init_rank == 1 and method.beta1 == method.beta2 == 0.85
            assert method.rank_step == {"r2": 1, "r8": 1 if task == "mnli" else 4}[budget]
    assert composed("increlora", "r8", "stsb").settings_from.startswith("derived")  # no script of the authors' has it


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


def test_recipes_of_adalora_say_what_its_paper_says():
    for budget in WITH_RECIPES:
        for task in GLUE:
            with naming(f"{budget} {task}"):
                cfg, ours = composed("adalora", budget, task), composed("increlora", budget, task)
                train, m = cfg.train, cfg.method
                found = (train.learning_rate, train.epochs, m.orth_weight, m.init_warmup, m.interval)
                assert (*found, m.final_steps, m.alpha) == ADALORA[task] and train.batch_size == 32
                assert train.eval_interval == ours.train.eval_interval and cfg.task == ours.task


def test_controls_share_every_setting_with_increlora_but_what_they_control():
    own = {"_target_", "name", "init_rank", "pattern", "keyed_by"}
    for method, budget, task in [cell for cell in recipes() if cell[0] in CONTROLS]:
        with naming(f"{method} {budget} {task}"):
            theirs = f"recipe/increlora/{budget}/{task}"
            recipe = yaml.safe_load((CONFIGS / "recipe" / method / budget / f"{task}.yaml").read_text())
            assert recipe == {
                "defaults": [f"/{theirs}", "_self_"],
                "settings_from": f"those of increlora, unchanged (configs/{theirs}.yaml)",
            }
    for method in CONTROLS:  # and so composed
        for budget in WITH_RECIPES:
            ours, control = (config.resolved(composed(name, budget, "rte")) for name in ("increlora", method))
            assert control["train"] == ours["train"] and control["task"] == ours["task"]
            shared = {key: value for key, value in control["method"].items() if key not in own}
            assert shared == {key: value for key, value in ours["method"].items() if key not in own}


def test_unpublished_recipes_train_as_long_on_the_same_input_as_increlora():
    for method in ("full", "lora", "bitfit", "houlsby", "pfeiffer"):
        for budget in WITH_RECIPES:
            for task in GLUE:
                cfg, ours = composed(method, budget, task), composed("increlora", budget, task)
                with naming(f"{method} {budget} {task}"):
                    assert cfg.task == ours.task
                    for key in ("epochs", "batch_size", "warmup_steps", "eval_interval", "weight_decay"):
                        assert cfg.train[key] == ours.train[key], key


ABLATIONS = {
    "no_orthogonality": (0, True, True),
    "no_advance_learning": (0.3, False, True),
    "no_restart_warmup": (0.3, True, False),
    "only_orthogonality": (0.3, False, False),
    "only_advance_learning": (0, True, False),
    "only_restart_warmup": (0, False, True),
    "raw_growth": (0, False, False),
}


def test_ablations_of_table_2_change_what_their_names_say():
    for name, expected in ABLATIONS.items():
        with naming(name):
            method = config.load(["task=rte", f"experiment={name}"]).method
            assert (method.orth_weight, method.advance_learning, method.restart_warmup) == expected
