"""Studies by the history: the protocol alone and before the first run, all runs on one commit that is there."""

import json
from pathlib import Path

import pytest
from conftest import ROOT
from study_history import faults, git, protocols


@pytest.fixture
def history() -> Path:
    """The repository, if its whole history is there."""
    if not (ROOT / ".git").exists():
        pytest.skip("the order of commits is asked of git, and there is no .git")
    if git(ROOT, "rev-parse", "--is-shallow-repository") == "true":
        pytest.skip("the order of commits is asked of git, and this clone is shallow: git fetch --unshallow")
    return ROOT


def test_every_study_of_this_repository_had_its_protocol_first(history):
    assert [fault for study in protocols(history) for fault in faults(history, study)] == []


PROTOCOL = "results/studies/trial.md"


class Repository:
    """A repository in which a study is made step by step."""

    def __init__(self, root: Path):
        self.root = root
        git(root, "init", "--quiet")
        self.commit("code.py")

    def commit(self, *names: str, content: str = "x") -> str:
        for name in names:
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        git(self.root, "add", "--all")
        author = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        git(self.root, *author, "commit", "--quiet", "--message", "x")
        return git(self.root, "rev-parse", "HEAD")

    def run(self, seed: int, commit: str, **code) -> None:
        stored = {"run": {"overrides": ["experiment=trial"]}, "code": {"commit": commit, "dirty": False} | code}
        name = f"results/runs/minilm/r2/lora/stsb/experiment=trial/seed{seed}.json"
        self.commit(name, content=json.dumps(stored))


@pytest.fixture
def repository(tmp_path) -> Repository:
    return Repository(tmp_path)


def test_protocol_then_runs_of_one_commit_is_in_order(repository):
    assert faults(repository.root, "trial") == [f"{PROTOCOL} is not committed"]
    repository.commit(PROTOCOL)
    assert faults(repository.root, "trial") == []
    commit = repository.commit("more.py")
    for seed in (1, 2):
        repository.run(seed, commit, commits=[commit])
    repository.commit("findings.md")
    assert faults(repository.root, "trial") == []


def test_what_is_out_of_order_is_told(repository):
    early = git(repository.root, "rev-parse", "HEAD")
    repository.commit(PROTOCOL, "other.py")
    assert faults(repository.root, "trial") == [f"{PROTOCOL} was committed together with 1 other files"]
    repository.run(1, early)
    assert faults(repository.root, "trial")[1:] == [f"the runs' commit {early[:10]} does not have the protocol yet"]
    later = git(repository.root, "rev-parse", "HEAD")
    repository.run(1, later, dirty=True)
    repository.commit(PROTOCOL, content="changed")
    assert faults(repository.root, "trial")[1:] == [
        "a run used a tree with uncommitted changes", f"{PROTOCOL} changed after the runs' commit {later[:10]}",
    ]  # fmt: skip
    repository.run(2, "0" * 40)
    found = faults(repository.root, "trial")
    assert "the runs used 2 commits" in found and "the runs' commit 0000000000 is not in the history" in found


def test_a_commit_of_another_branch_is_not_in_the_history(repository):
    repository.commit(PROTOCOL)
    git(repository.root, "checkout", "--quiet", "-b", "side")
    aside = repository.commit("aside.py")
    git(repository.root, "checkout", "--quiet", "-")
    repository.run(1, aside)
    assert faults(repository.root, "trial") == [f"the runs' commit {aside[:10]} is not in the history"]
