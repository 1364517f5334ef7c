"""scripts/collect.py: what becomes of finished runs on their way into results/runs."""

import json

from conftest import ROOT
from finished_runs import SYNTHETIC, finished
from in_process import call, load

from increlora import result_files
from increlora.glue import results

script = load(ROOT / "scripts" / "collect.py")


def test_results_of_clean_commits_are_copied_without_paths_of_this_machine(tmp_path, monkeypatch, capsys):
    run_dir = finished(tmp_path / "runs" / "tiny" / "seed41", "backbone=tiny", *SYNTHETIC, "method=lora")
    result = json.loads((run_dir / "result.json").read_text())
    clean = result | {"code": result["code"] | {"dirty": False}, "data": result["data"] | {"source": "/home/me/glue"}}
    (run_dir / "result.json").write_text(json.dumps(result_files.sealed(clean), indent=1))
    for name, code in (
        ("seed42", {"dirty": True}), ("seed43", {"commits": ["c0ffee", "decade"]}), ("seed44", {"commit": None}),
    ):  # fmt: skip
        other = tmp_path / "runs" / "tiny" / name
        other.mkdir()
        changed = result_files.sealed(clean | {"code": clean["code"] | code})
        (other / "result.json").write_text(json.dumps(changed))
    (tmp_path / "runs" / "tiny" / "seed45").mkdir()
    (tmp_path / "runs" / "tiny" / "seed45" / "result.json").write_text("{}")
    (tmp_path / "runs" / "tiny" / "seed46").mkdir()
    elsewhere = clean | {"run": clean["run"] | {"task": "../../../elsewhere"}}
    (tmp_path / "runs" / "tiny" / "seed46" / "result.json").write_text(json.dumps(result_files.sealed(elsewhere)))
    into = ("--into", tmp_path / "results" / "repeats")
    assert call(script, monkeypatch, tmp_path / "runs", *into) == 1  # something was no result; the others are taken
    said = capsys.readouterr()
    assert "1 results copied to results/repeats" in said.out
    assert "uncommitted changes" in said.err and "seed42" in said.err
    assert "it ran on c0ffee, decade" in said.err and "seed43" in said.err
    (path,) = (tmp_path / "results").rglob("*.json")
    copied = json.loads(path.read_text())
    assert copied == result_files.sealed(clean | {"data": clean["data"] | {"source": "glue"}})
    assert "its commit is not known" in said.err and "seed44" in said.err
    assert "seed45/result.json is not the result of a run" in said.err
    assert "seed46/result.json is not the result of a run: a task that is no name, '../../../elsewhere'" in said.err


def test_a_result_goes_where_its_run_belongs_and_none_takes_the_place_of_another(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "DESTINATION", tmp_path / "results" / "runs")
    runs = tmp_path / "runs"
    for method in ("lora", "uniform"):  # each collected from a folder that does not name its method
        run_dir = finished(runs / method / "seed41", "backbone=tiny", *SYNTHETIC, f"method={method}")
        assert call(script, monkeypatch, run_dir, "--dirty") == 0
    collected = sorted(path.relative_to(tmp_path / "results") for path in (tmp_path / "results").rglob("*.json"))
    assert [path.parts[3] for path in collected] == ["lora", "uniform"]
    assert {path.name for path in collected} == {"seed41.json"} and len(
        result_files.load_runs(tmp_path / "results")
    ) == 2
    capsys.readouterr()
    again = json.loads((run_dir / "result.json").read_text()) | {"skipped_steps": 7}
    (runs / "zzz").mkdir()
    (runs / "zzz" / "result.json").write_text(json.dumps(result_files.sealed(again)))
    assert call(script, monkeypatch, runs, "--dirty") == 1  # two results of one run
    said = capsys.readouterr()
    assert "2 results copied to" in said.out and f"another result of the same run as {run_dir}" in said.err
    assert call(script, monkeypatch, runs / "zzz", "--dirty") == 0
    assert "1 results copied, 1 of them in place of others" in capsys.readouterr().out


def test_of_an_absolute_folder_the_name_is_kept():
    for source in ("nyu-mll/glue@bcdcba79", "../shared/glue", "synthetic"):
        assert results.place(source) == source
    assert results.place("/home/me/glue") == results.place("/home/me/glue/") == "glue"


def test_a_folder_that_is_not_there_is_refused_and_the_run_itself_may_be_given(tmp_path, monkeypatch, capsys):
    assert call(script, monkeypatch, tmp_path / "nowhere") == 2 and "no such folder" in capsys.readouterr().err
    run_dir = finished(tmp_path / "runs" / "seed41", "backbone=tiny", *SYNTHETIC, "method=lora")
    monkeypatch.setattr(script, "DESTINATION", tmp_path / "results" / "runs")
    assert call(script, monkeypatch, run_dir, "--dirty") == 0
    assert len(list((tmp_path / "results").rglob("seed41.json"))) == 1
