"""scripts/report.py: the page of every committed run read back, odd runs, bad input, and a look at it in a browser."""

import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest
from conftest import ROOT
from in_process import load
from naming import naming
from warm_python import python

from increlora import result_files
from increlora.glue import config
from increlora.matrices import rank_map

SCRIPT, RUNS = ROOT / "scripts" / "report.py", ROOT / "results" / "runs"
INCRELORA = next(RUNS.glob("minilm/r2/increlora/mrpc/experiment=minilm_comparison*/*.json"))
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "br", "rect", "line", "polyline", "circle"}


script = load(SCRIPT)


class Page(HTMLParser):
    """What a page holds: tags with attributes, text by the element it stands in, tables as rows of text."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.open, self.texts, self.tables = [], [], [], []
        self.feed(html)
        assert not self.open, "not every tag is closed"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", " ".join(data.split())))
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def attributes(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def text(self, tag=None):
        return " ".join(text for name, text in self.texts if text and tag in (None, name))

    def table(self, *head):
        return next((table for table in self.tables if table[0][: len(head)] == list(head)), None)


@pytest.fixture(scope="module")
def pages() -> dict[str, tuple[dict, Page]]:
    """Method and task -> result and page of one committed run of each, however many seeds and settings there are."""
    one_of_each = {path.relative_to(RUNS).parts[2:4]: path for path in sorted(RUNS.glob("*/*/*/*/*/*.json"))}
    assert len({method for method, _ in one_of_each}) > 5
    read = {" ".join(kind): result_files.read(path) for kind, path in sorted(one_of_each.items())}
    return {name: (result, Page(script.report(result))) for name, result in read.items()}


def changed(**parts):
    return json.loads(INCRELORA.read_text()) | parts


# the pages of committed runs, one of every method and task


def test_nothing_leaves_the_file(pages):
    for name, (_, page) in pages.items():
        with naming(name):
            assert not {"script", "link", "img", "iframe", "object", "base", "a"} & {tag for tag, _ in page.tags}
            outside = {"src", "href", "xlink:href", "srcset", "data", "poster", "action", "background"}
            assert not any(outside & set(attributes) for _, attributes in page.tags)
            styles = page.text("style") + " ".join(attributes.get("style", "") for _, attributes in page.tags)
            assert "url(" not in styles and "@import" not in styles and "--paper" in styles


def test_it_can_be_read_without_eyes(pages):
    for name, (_, page) in pages.items():
        with naming(name):
            assert page.attributes("html") == [{"lang": "en"}] and page.text("title")
            ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
            assert len(ids) == len(set(ids)) > 0
            levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
            assert levels[0] == 1 and levels.count(1) == 1
            assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
            assert len(page.attributes("caption")) == len(page.attributes("table")) > 0
            assert all(attributes.get("scope") in ("col", "row") for attributes in page.attributes("th"))
            for attributes in page.attributes("svg"):
                named = attributes.get("aria-label") or set(attributes["aria-labelledby"].split()) <= set(ids)
                assert attributes["role"] == "img" and named


def test_every_value_is_there(pages):
    for name, (result, page) in pages.items():
        with naming(name):
            text, cost = page.text(), result["cost"]
            primary = result["config"]["task"]["primary"]
            primary = primary if isinstance(primary, str) else f"mean of {' and '.join(primary)}"
            assert f"The score is {primary} on dev." in text
            for choice, score in result["scores"].items():
                assert f"{choice}" in page.text("li") and f"{100 * score['score']:.2f}" in page.text("strong")
                assert f"step {score['step']:,}" in text
            metrics = page.table("metric", "best", "last")
            for metric, value in result["scores"]["best"]["metrics"]["dev"].items():
                shown = f"{value:.4f}" if metric == "loss" else f"{100 * value:.2f}"
                assert metric == "score" or [row[1] for row in metrics if row[0] == f"dev {metric}"] == [shown]
            counts = dict((row[0], row[1]) for row in page.table("part"))
            assert {
                kind: f"{count:,}" for kind, count in result["parameters"]["best"].items()
            }.items() <= counts.items()
            measured = dict(row for row in page.table("what", "how much"))
            assert measured["steps"] == f"{cost['steps']:,}" and measured["tokens"] == f"{cost['tokens']:,}"
            assert measured["padding"].startswith(f"{100 * cost['padded_tokens'] / cost['tokens']:.1f}%")
            peak = cost["peak_memory_mb"]  # not known after another run in this process
            assert measured["peak memory"] == (f"{peak:,.0f} MB" if peak else "not known")
            assert dict(row for row in page.table("what", "which"))["torch"] == result["code"]["versions"]["torch"]
            for value in (result["code"]["commit"], result["data"]["fingerprint"], result["data"]["source"]):
                assert value in text
            assert "without uncommitted changes" in text and "Uncommitted" not in text
            shown = re.search(r"learning_rate: (\S+)", page.text("pre"))  # YAML writes 3.0e-05 for 3e-05
            assert float(shown[1]) == result["config"]["train"]["learning_rate"]
            assert [row[0] for row in page.table("step", "epoch")[1:]] == [f"{p['step']:,}" for p in result["curve"]]


def test_ranks_and_their_changes_are_those_of_the_run(pages):
    for name, (result, page) in pages.items():
        with naming(name):
            final, allocations = result["ranks"]["last"], result["allocations"]
            table, words = page.table("layer"), page.table("step", "total", "what changed")
            assert (table is None) == (not final) == ("Ranks" not in page.text("h2").split())
            assert (words is None) == (not allocations) == (len(page.attributes("svg")) == 1)
            if final:
                shown = [[int(cell.split()[-1]) for cell in row[1:]] for row in table[1:]]
                assert shown == rank_map(final, result["config"]["method"]["kinds"])[2]
            if allocations:
                assert len(words) == 1 + len(allocations) and words[-1][1] == str(sum(final.values()))
                for row, allocation in zip(words[1:], allocations, strict=True):
                    signed = [
                        int(number.replace("\N{MINUS SIGN}", "-")) for number in re.findall(r"[+\u2212]\d+", row[2])
                    ]
                    assert signed == list(allocation["added"].values())
                scored = [table for table in page.tables if table[0][0] == "layer"][1:]
                assert len(scored) == sum(bool(allocation["scores"]) for allocation in allocations)
                for table, allocation in zip(scored, allocations, strict=False):
                    grown = [cell for row in table for cell in row if "(+" in cell]
                    assert [int(cell.split("(")[1][:-1]) for cell in grown] == list(allocation["added"].values())
                    chosen = [allocation["scores"][matrix] for matrix in allocation["added"]]
                    assert sorted(float(cell.split()[0]) for cell in grown) == pytest.approx(sorted(chosen), rel=0.06)


def test_the_command_line_is_the_run(pages):
    for name, (result, page) in pages.items():
        with naming(name):
            words = shlex.split(page.text("pre").partition("python run.py ")[2].partition(" seed: ")[0])
            cfg = config.load(words)
            identity = ("backbone", "budget", "method", "task", "seed", "recipe", "overrides")
            assert {key: config.identity(cfg, words)[key] for key in identity} == {
                key: result["run"][key] for key in identity
            }


# runs that are unlike those


def test_all_text_is_escaped():
    evil = "<script>alert('&amp;')</script>"
    result = changed(config={**changed()["config"], "note": evil}, status=evil)
    result["run"] |= {"task": evil, "settings_from": evil, "overrides": [evil]}
    result["data"]["source"] = result["code"]["machine"] = evil
    html = script.report(result)
    page = Page(html)
    assert "<script" not in html and page.text().count(evil) >= 6
    assert evil in page.text("h1") and evil in page.text("title")


def test_a_run_that_diverged_at_once_and_dirty_code_are_said_plainly():
    result = changed(status="diverged", curve=[], scores={}, parameters={}, allocations=[], skipped_steps=20)
    result["ranks"] = {"start": result["ranks"]["start"]}
    result["cost"] |= {"steps": 0, "tokens": 0}
    result["code"] |= {"dirty": True, "processes": 2}
    result["run"]["seed"] = 7
    page = Page(script.report(result))
    assert "diverged after 0 steps" in page.text() and "20 skipped" in page.text("p")
    assert "it has no score" in page.text("p") and not page.attributes("svg")
    assert page.text().count("ncommitted changes") == 2
    words = "torchrun --nproc-per-node 2 run.py backbone=minilm budget=r2 method=increlora task=mrpc seed=7"
    assert words in page.text("pre")
    result["code"] |= {"commit": None, "dirty": False}
    page = Page(script.report(result))
    assert "not in a git repository" in page.text() and "git checkout" not in page.text("pre")


def test_every_split_and_the_clean_score_are_drawn_to_scale():
    result = changed(allocations=[], cost=changed()["cost"] | {"steps": 100})
    splits = [{"dev_matched": d, "dev_mismatched": m, "holdout": h} for d, m, h in ((0.5, 0.6, 0.7), (0.8, 0.75, 0.65))]
    points = [{split: {"accuracy": v, "score": v, "loss": 1 - v} for split, v in point.items()} for point in splits]
    result["curve"] = [
        {"step": step, "epoch": 1.0, "seconds": 1.0, "total_rank": 72, "scores": scores}
        for step, scores in zip((50, 100), points, strict=True)
    ]
    chosen = {"best": 1, "last": 1, "clean": 0}
    result["scores"] = {
        choice: {"score": splits[i]["dev_matched"], "step": (50, 100)[i], "metrics": points[i]}
        for choice, i in chosen.items()
    }
    result["parameters"]["clean"] = result["parameters"]["last"]
    page = Page(script.report(result))
    lines = [[tuple(map(float, xy.split(","))) for xy in a["points"].split()] for a in page.attributes("polyline")]
    assert [x for x, _ in lines[0]] == [(52 + 690) / 2, 690]  # half-way and at the end
    # one scale for all: 30 points of dev_matched are six times 5 of holdout, upwards is better
    rises = [first[1] - last[1] for first, last in lines]
    assert rises[0] > 0 and rises[1] == pytest.approx(rises[0] / 2, abs=0.2)
    assert rises[2] == pytest.approx(-rises[0] / 6, abs=0.2)
    assert "best and last 80.00" in page.text("text") and "clean 50.00" in page.text("text")
    assert "dashed line: dev_mismatched; dotted line: holdout" in page.text("figcaption")
    assert "held-out part of train, scored on dev_matched" in page.text("li")
    assert [row[0] for row in page.table("metric")[1:]] == [f"{s} {m}" for s in splits[0] for m in ("accuracy", "loss")]


def test_few_maps_of_many_changes_start_and_end_with_the_run():
    result = result_files.read(next(RUNS.glob("minilm/r2/adalora/cola/*/*.json")))
    maps = script.growth(result)["maps"]
    assert len(result["allocations"]) > 100 and len(maps) <= 13
    assert maps[0][0] == 0 and maps[-1][0] == result["allocations"][-1]["step"]
    assert sum(map(sum, maps[0][1])) == 108 and sum(map(sum, maps[-1][1])) == 72


def test_colours_keep_their_distance():
    """WCAG 2 contrast: 4.5 for text, also on the strongest and faintest cell of a map; 3 for lines."""
    styles = re.findall(r":root \{(.*?)\}", Page(script.report(changed())).text("style"))
    for scheme, style in zip(("light", "dark"), styles, strict=False):
        with naming(scheme):
            assert_contrast(style)


def assert_contrast(style: str) -> None:
    colours = {key: value * (2 if len(value) == 3 else 1) for key, value in re.findall(r"--(\w+): #(\w+)", style)}

    def luminance(colour):
        parts = np.array([int(colours[colour][i : i + 2], 16) / 255 for i in (0, 2, 4)])
        return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    def contrast(one, other):
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    assert all(contrast("ink", on) >= 4.5 for on in ("paper", "panel", "heat"))
    assert all(contrast(text, "paper") >= 4.5 for text in ("soft", "main", "bad"))
    assert contrast("main", "paper") >= 3 and contrast("other", "paper") >= 3


# the command


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
    script.main()


def test_it_is_written_beside_the_result_and_the_same_every_time(tmp_path, monkeypatch, capsys):
    shutil.copyfile(INCRELORA, tmp_path / "result.json")
    call(monkeypatch, tmp_path)
    assert capsys.readouterr().out.split() == ["report:", str(tmp_path / "result.html")]
    again = tmp_path / "again.html"  # from another process, whose hashes differ
    subprocess.run([python(), SCRIPT, INCRELORA, "--output", again], check=True, capture_output=True)
    assert again.read_bytes() == (tmp_path / "result.html").read_bytes()


def test_what_is_no_result_is_refused_in_two_lines(tmp_path, monkeypatch, capsys):
    for content, message in [
        (None, "cannot read the result file"),
        ("{", "cannot read the result file"),
        ("[1]", "is not the result of a run: it has no status, run, code.\nGive a run directory"),
        ('{"run": {}}', "is not the result of a run: it has no status, code, data.\n"),
    ]:
        with naming((content, message)):
            path = tmp_path / "result.json"
            if content:
                path.write_text(content)
            with pytest.raises(SystemExit) as left:
                call(monkeypatch, tmp_path)
            said = capsys.readouterr().err
            assert left.value.code == 2 and message in said and str(path) in said and len(said.splitlines()) <= 2
            assert not path.with_suffix(".html").exists()


def test_a_report_that_cannot_be_written_is_said_in_two_lines(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as left:
        call(monkeypatch, INCRELORA, "--output", tmp_path / "absent" / "report.html")
    said = capsys.readouterr().err
    assert left.value.code == 2 and "cannot write" in said and len(said.splitlines()) == 2


# a browser


def browse(tmp_path, page, *arguments):
    quiet = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    common = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    command = [
        CHROMIUM,
        *common,
        *quiet,
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}",
        *arguments,
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found (Debian: apt-get install chromium)")
def test_a_browser_shows_it_in_light_and_dark_without_complaint(tmp_path):
    path, noisy = tmp_path / "report.html", tmp_path / "noisy.html"
    path.write_text(script.report(changed()), encoding="utf-8")
    noisy.write_text("<script>console.error('heard')</script>")
    assert browse(tmp_path, noisy, "--dump-dom")[1]  # or silence would prove nothing
    dom, complaints = browse(tmp_path, path, "--dump-dom")
    headings = re.findall("<h2>(.*?)</h2>", dom)
    assert not complaints
    assert headings == [
        "Scores", "Ranks", "Cost", "Parameters", "Data", "Code", "How to repeat it", "Configuration",
    ]  # fmt: skip
    shades = []
    for scheme in (1, 0):  # light, dark
        picture = tmp_path / "picture.png"
        browse(tmp_path, path, "--window-size=1200,1500", f"--screenshot={picture}",
               f"--blink-settings=preferredColorScheme={scheme}")  # fmt: skip
        pixels = (255 * matplotlib.image.imread(picture)[..., :3]).round().astype(int)
        assert pixels.shape == (1500, 1200, 3)
        background = (pixels == pixels[0, 0]).all(axis=-1)
        assert 0.5 < background.mean() < 0.99  # neither blank nor covered
        assert not background[-600:].all() and not background[:300].all()
        shades.append(pixels[0, 0].mean())
    assert shades[0] > 200 and shades[1] < 60


def test_the_result_file_is_not_replaced_by_its_report(tmp_path, monkeypatch, capsys):
    path = tmp_path / "result.json"
    path.write_bytes(INCRELORA.read_bytes())
    with pytest.raises(SystemExit):
        call(monkeypatch, tmp_path, "--output", path)
    assert "which the report would replace" in capsys.readouterr().err
    assert path.read_bytes() == INCRELORA.read_bytes()
