"""Every command of the documentation runs, in a copy of the repository; what needs a hub or a cluster is composed.

So that this takes seconds, training commands get the overrides of `pages.SHORT` on top. The how-to has its own file.
"""

import re

import pytest
import yaml
from conftest import ROOT
from in_process import call, load
from naming import naming
from pages import BLOCK, PAGES, blocks, compose, copy_to, follow


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page) and page.stem != "how_to"], ids=lambda page: page.stem
)
def test_every_command_of_a_page(page, tmp_path):
    follow(page, copy_to(tmp_path))


def test_readme_commands_compose():
    for kind, text in BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8")):
        for line in text.splitlines() if kind != "python" else ():
            if "run.py" in line or "scripts/" in line:
                with naming(line):
                    compose(line)


def test_links_lead_somewhere():
    for page in (*PAGES, *ROOT.glob("*.md"), ROOT / "results" / "README.md"):
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if not target.startswith(("http:", "https:")):
                with naming(f"{page.name}: {target}"):
                    assert_leads_somewhere(page, target)


def assert_leads_somewhere(page, target) -> None:
    path, _, anchor = target.partition("#")
    file = page.parent / path if path else page
    assert file.exists()
    if anchor:
        headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.M)
        assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_the_reference_of_keys_is_not_stale(monkeypatch, capsys):
    script = load(ROOT / "scripts" / "configuration.py")
    assert call(script, monkeypatch, "--check") == 0, f"run `make docs`: {capsys.readouterr().out}"


def test_the_citation_names_the_authors_of_the_paper_as_the_readme_does():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["preferred-citation"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    names = [f"{author['family-names']}, {author['given-names']}" for author in cited["authors"]]
    for key, value in (("author", " and ".join(names)), ("title", cited["title"]), ("journal", cited["journal"])):
        assert re.search(rf"{key} += {{{re.escape(value)}}}", readme), key
