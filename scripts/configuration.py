"""Write docs/configuration.md: every key, its default and what it means, from the YAML files and the docstrings.

python scripts/configuration.py            # or: make docs
python scripts/configuration.py --check    # exit 1 if it is stale
"""

import argparse
import inspect
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.utils import get_class
from omegaconf import OmegaConf

from increlora.files import write_text
from increlora.glue.config import CONFIGS, guarded
from increlora.glue.settings import Settings

PAGE = CONFIGS.parent / "docs" / "configuration.md"
OF_ALL = ("name", "seed", "kinds", "head", "_target_")
HEAD = """# Configuration keys

Written by `python scripts/configuration.py` from `configs/` and the docstrings.
Every key can be set on the command line (`train.epochs=3 method.interval=50`).
`python run.py --cfg job` shows every key with its value in a run.
`null` stands for nothing, `${...}` for the value of another key.
The command line overrides `experiment`, which overrides `recipe`, which overrides `method` and `task`.
"""


def meanings(kind: type) -> dict[str, str]:
    """Argument -> what the docstrings of a class and its bases say of it."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        text = inspect.cleandoc(base.__doc__ or "")
        section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", text, flags=re.S | re.M)
        for names, meaning in re.findall(
            r"^    ([\w, ]+): (.*?)(?=^    \w|\Z)", section[1] if section else "", re.S | re.M
        ):
            for name in names.split(", "):
                found[name] = " ".join(meaning.split())
    return found


def keys(prefix: str, values: Mapping[str, Any], known: Mapping[str, str]) -> str:
    """A table of keys with their defaults and meanings."""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for name, value in values.items():
        if name != "_target_":
            meaning = known.get(name, "").replace("|", "\\|")
            rows.append(f"| `{prefix}{name}` | {shown(value)} | {meaning} |")
    return "\n".join(rows)


def shown(value: Any) -> str:
    """A default as one types it; what is long is named by its kind."""
    if isinstance(value, dict) or len(str(value)) > 60:
        return "(see the file)"
    text = str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
    return f"`{text}`".replace("|", "\\|")


def read(path: Path) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.load(path))


def composed(path: Path) -> dict[str, Any]:
    """A file of a group with the files of its group that it builds on."""
    own = read(path)
    parents = [path.with_name(f"{name}.yaml") for name in own.pop("defaults", []) if name != "_self_"]
    return {key: value for parent in parents for key, value in composed(parent).items()} | own


def comments(path: Path) -> dict[str, str]:
    """Top-level key -> the comment on its line."""
    return dict(re.findall(r"^(\w+):[^#\n]*# (.*)$", path.read_text(encoding="utf-8"), flags=re.M))


def first_comment(path: Path) -> str:
    """What a file says of itself in its first comments."""
    lines = path.read_text(encoding="utf-8").splitlines()
    told = [line.removeprefix("# ") for line in lines if line.startswith("# ") and "@package" not in line]
    command, _, text = told[0].partition("   ")
    return text.strip() or (told[1] if command.startswith("python") else command)


def page() -> str:
    """The whole page."""
    config = CONFIGS / "config.yaml"
    top = {key: value for key, value in read(config).items() if not isinstance(value, (dict, list))}
    known = comments(config) | {
        "seed": "of everything random: data order, head, components, dropout, held-out data",
        "device": "auto, cpu, cuda, cuda:<n>",
    }
    parts = [HEAD, "## Top level\n", keys("", top, known)]
    settings = {k: v for k, v in read(config)["train"].items() if k not in ("precision", "device", "seed")}
    parts += ["\n## train\n", keys("train.", settings, meanings(Settings))]
    parts += [
        "\n## method\n",
        "Every method has `method.name`, `method.seed`, and from the backbone `kinds` and `head`.",
    ]
    for path in sorted((CONFIGS / "method").glob("*.yaml")):
        values = composed(path)
        told = meanings(get_class(values["_target_"]))
        parent = next((name for name in read(path).get("defaults", []) if name != "_self_"), None)
        inherited = composed(path.with_name(f"{parent}.yaml")) if parent else {}
        values = {k: v for k, v in values.items() if k not in OF_ALL and inherited.get(k, ...) != v}
        beside = f"The keys of `{parent}`" + (", of which differ or are new:" if values else ".") if parent else ""
        parts += [f"\n### method={path.stem}\n", first_comment(path), "", *([f"{beside}\n"] if parent else [])]
        parts += [keys("method.", values, told)] if values else []
    for group, example in (("task", "mrpc"), ("backbone", "minilm")):
        names = ", ".join(f"`{path.stem}`" for path in sorted((CONFIGS / group).glob("*.yaml")))
        values = read(CONFIGS / group / f"{example}.yaml")
        known = meanings(get_class(values["_target_"]))
        parts += [f"\n## {group}\n", f"One of {names}. Defaults of `{example}`:\n", keys(f"{group}.", values, known)]
    budgets = {path.stem: read(path) for path in (CONFIGS / "budget").glob("*.yaml")}
    names = sorted(budgets, key=lambda name: budgets[name]["rank"])
    parts += [
        "\n## budget\n",
        "| key | " + " | ".join(f"`{name}`" for name in names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for key in ("rank", "rank_step", "houlsby", "pfeiffer"):
        parts.append(f"| `budget.{key}` | " + " | ".join(str(budgets[name][key]) for name in names) + " |")
    parts += ["\n## tracker\n", keys("tracker.", read(CONFIGS / "tracker" / "wandb.yaml"),
              comments(CONFIGS / "tracker" / "wandb.yaml"))]  # fmt: skip
    parts += ["\n## experiment\n", "| name | what it is |", "|---|---|"]
    parts += [f"| `{path.stem}` | {first_comment(path)} |" for path in sorted((CONFIGS / "experiment").glob("*.yaml"))]
    parts += ["\n## sweep\n", "`python scripts/sweep.py NAME`:\n", "| name | runs |", "|---|---|"]
    parts += [f"| `{path.stem}` | {read(path)['about']} |" for path in sorted((CONFIGS / "sweep").glob("*.yaml"))]
    return "\n".join(parts) + "\n"


@guarded
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if something would change")
    check = parser.parse_args().check
    text = page()
    stale = not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text
    if stale and not check:
        PAGE.parent.mkdir(exist_ok=True)
        write_text(PAGE, text)
    if stale:
        print(f"{'stale' if check else 'written'}: docs/{PAGE.name}")
    return int(check and stale)


if __name__ == "__main__":
    sys.exit(main())
