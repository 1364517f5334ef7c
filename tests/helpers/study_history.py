"""What the git history says of a study: whether its protocol was there first, alone and unchanged; its runs' commit."""

import json
import subprocess
from pathlib import Path


def git(root: Path, *arguments: str) -> str:
    command = ["git", "-c", "safe.directory=*", *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()


def is_ancestor(root: Path, older: str, newer: str) -> bool:
    """Whether a commit is in the history of another (or that commit itself); an unknown one is in none."""
    command = ["git", "-c", "safe.directory=*", "merge-base", "--is-ancestor", older, newer]
    return subprocess.run(command, cwd=root, capture_output=True).returncode == 0


def protocols(root: Path) -> list[str]:
    """The studies that have a protocol."""
    return sorted(path.stem for path in (root / "results" / "studies").glob("*.md"))


def runs(root: Path, study: str) -> list[dict]:
    """The committed runs of a study."""
    tracked = git(root, "ls-files", "results/runs/*.json", "results/repeats/*.json").splitlines()
    found = [json.loads((root / name).read_text(encoding="utf-8")) for name in tracked]
    return [run for run in found if f"experiment={study}" in run["run"]["overrides"]]


def faults(root: Path, study: str) -> list[str]:
    """What is wrong with the order of protocol and runs, in words; nothing if all is well."""
    protocol = f"results/studies/{study}.md"
    added = git(root, "log", "--diff-filter=A", "--format=%H", "--reverse", "--", protocol).splitlines()
    if not added:
        return [f"{protocol} is not committed"]
    found = []
    beside = git(root, "show", "--format=", "--name-only", added[0]).splitlines()
    if beside != [protocol]:
        found.append(f"{protocol} was committed together with {len(beside) - 1} other files")
    of_study = runs(root, study)
    if any(run["code"]["dirty"] for run in of_study):
        found.append("a run used a tree with uncommitted changes")
    commits = {commit for run in of_study for commit in (run["code"]["commit"], *run["code"].get("commits", ()))}
    if len(commits) > 1:
        found.append(f"the runs used {len(commits)} commits")
    for commit in sorted(commits):
        found += order_faults(root, commit, added[0], (protocol, f"configs/study/{study}.yaml"))
    return found


def order_faults(root: Path, commit: str, protocol: str, fixed: tuple[str, ...]) -> list[str]:
    """What is wrong with the commit that runs used: not in the history, before the protocol, or the plan changed since.

    Args:
        protocol: the commit that brought the protocol.
        fixed: the files that must not change after the runs began.
    """
    if not is_ancestor(root, commit, "HEAD"):
        return [f"the runs' commit {commit[:10]} is not in the history"]
    if not is_ancestor(root, protocol, commit):
        return [f"the runs' commit {commit[:10]} does not have the protocol yet"]
    changed = [name for name in fixed if git(root, "log", "--format=%H", f"{commit}..HEAD", "--", name)]
    return [f"{name} changed after the runs' commit {commit[:10]}" for name in changed]
