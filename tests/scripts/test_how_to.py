"""docs/how_to.md followed to the letter in a full copy of the repository, and then the tests there.

The page adds a task, a method and a backbone. Each is as many files as the page says, and none breaks a test.
"""

import pytest
from conftest import ROOT
from pages import copy_to, execute, follow, repository_files

# what looks at every method, task, backbone or baseline; conformance of the new method is in the page itself
RELEVANT = (
    "tests/core/test_imports.py",
    "tests/glue/test_config.py::test_every_choice_composes_and_resolves",
    "tests/glue/test_config.py::test_every_yaml_opens_with_the_command_it_answers_or_its_package",
    "tests/glue/test_recipes.py::test_a_method_has_recipes_for_every_glue_task_at_r2_and_r8_or_none",
    "tests/glue/test_recipes.py::test_every_method_composes_and_builds_without_a_recipe",
    "tests/glue/test_tasks.py::test_every_yaml_is_short_says_its_command_and_names_the_fields",
    "tests/glue/test_backbone.py::test_the_head_and_every_kind_of_every_backbone_are_found_and_apart",
    "tests/analysis/test_figures.py::test_every_listed_method_has_a_look_of_its_own_and_any_other_a_spare_one",
    "tests/scripts/test_docs.py::test_the_reference_of_keys_is_not_stale",
)


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """The copy after every command of the page."""
    folder = copy_to(tmp_path_factory.mktemp("copy"))
    follow(ROOT / "docs" / "how_to.md", folder)
    return folder


def test_a_task_and_a_backbone_are_one_yaml_and_a_method_is_one_python_file_more(followed):
    known = repository_files()
    for group, added in (("baselines", "head_only.py"), ("configs/method", "head_only.yaml"),
                         ("configs/task", "answers.yaml"), ("configs/backbone", "electra_small.yaml"),
                         ("configs/recipe", None), ("increlora", None), ("tests", None)):  # fmt: skip
        files = {path.relative_to(followed).as_posix() for path in (followed / group).rglob("*.*") if path.is_file()}
        new = {name for name in files if not name.endswith(".pyc")} - set(known)
        assert new == ({f"{group}/{added}"} if added else set())


def test_what_the_page_adds_works_together(followed):
    from transformers import ElectraConfig, ElectraModel

    from increlora.glue.tokenizing import word_tokenizer

    tokenizer = word_tokenizer()
    thin = ElectraConfig(
        vocab_size=len(tokenizer), embedding_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    ElectraModel(thin).save_pretrained(followed / "electra")
    tokenizer.save_pretrained(followed / "electra")
    for method in ("head_only", "increlora"):
        said = execute(
            f"python run.py method={method} task=answers backbone=electra_small backbone.path=electra tracker=jsonl "
            "train.batch_size=2 train.epochs=12 train.warmup_steps=1",
            followed,
        )
        assert f"answers / {method} / r2 / electra_small / seed 41: finished" in said


def test_no_test_breaks_by_what_the_page_adds(followed):
    said = execute(f"python -m pytest -q -p no:cacheprovider {' '.join(RELEVANT)}", followed)
    assert " passed" in said and " failed" not in said
