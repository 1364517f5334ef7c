"""How figures look: colours apart, means and intervals as drawn, files that are the same every time."""

import itertools
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from conftest import ROOT

from increlora.analysis import comparison, figures, looks, selection
from increlora.analysis.tables import interval_text

matplotlib.use("agg")
import matplotlib.pyplot as plt

DRAW = """
import sys
import matplotlib
matplotlib.use("agg")
import matplotlib.pyplot as plt
from increlora.analysis import figures, looks
figures.use_style()
figure, axes = plt.subplots()
figures.draw_seeds(axes, 1.0, [1.0, 2.0, 4.0], looks.LOOKS["lora"], width=0.1)
axes.fill_between([0, 1], 0, 1)
axes.set_title("$W_q$")
figures.save(figure, sys.argv[1])
assert "torch" not in sys.modules and "pandas" not in sys.modules
"""


def test_every_listed_method_has_a_look_of_its_own_and_any_other_a_spare_one():
    assert set(looks.LOOKS) <= {path.stem for path in (ROOT / "configs" / "method").glob("*.yaml")}
    mine = looks.LOOKS["mine"]
    assert mine.label == "mine" and mine == looks.LOOKS["mine"] and "mine" not in looks.LOOKS
    for a, b in itertools.combinations([*looks.LOOKS.values(), mine], 2):
        assert a.color != b.color and a.marker != b.marker and a.label != b.label


def test_a_score_axis_is_labelled_whatever_the_metric():
    labels = [figures.metric({"config": {"task": {"primary": metric}}}) for metric in ("accuracy", "f1")]
    assert labels == ["accuracy (%)", "f1 (×100)"]


def test_published_methods_stay_apart_without_red_and_green():
    # Vienot et al. 1999, deuteranopia, in linear RGB: red and green become the same mixture of both
    published = [looks.LOOKS[name].color for name in ("increlora", "adalora", "lora", "full", "houlsby", "bitfit")]
    linear = np.array([[int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)] for color in published]) ** 2.2
    mixed = linear @ np.array([[0.29275, 0.29275, -0.02234], [0.70725, 0.70725, 0.02234], [0, 0, 1]])
    seen = np.clip(mixed, 0, 1) ** (1 / 2.2)
    for a, b in itertools.combinations(seen, 2):
        assert np.linalg.norm(a - b) > 0.15


def test_a_saved_figure_is_the_same_in_another_process(tmp_path):
    for name in ("a", "b"):
        environment = {"INCRELORA_RESULTS": str(tmp_path), "PYTHONHASHSEED": "random", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", DRAW, name], cwd=tmp_path, capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
    a, b = ((tmp_path / "figures" / f"{name}.svg").read_text() for name in ("a", "b"))
    assert a == b
    assert "<dc:date>" not in a and "Matplotlib v" not in a and str(tmp_path) not in a


def test_a_figure_that_cuts_its_data_off_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(selection, "RESULTS", tmp_path)
    figure, (left, right) = plt.subplots(1, 2, sharey=True)
    left.plot([0, 1], [0, 4])
    left.set_ylim(bottom=0)  # also fixes the top, for both
    right.plot([0, 1], [0, 7])
    with pytest.raises(ValueError, match="fig: an axis from 0 to 4"):
        figures.save(figure, "fig")
    left.set_ylim(0, 8)
    figures.save(figure, "fig")
    assert (tmp_path / "figures" / "fig.svg").exists()
    plt.close(figure)


def test_several_seeds_are_drawn_with_mean_and_interval():
    figure, axes = plt.subplots()
    figures.draw_seeds(axes, 2.0, [1.0, 2.0, 3.0], looks.LOOKS["lora"], width=0.2)
    seeds, interval, mean = axes.collections
    assert seeds.get_offsets().tolist() == [[1.9, 1.0], [2.0, 2.0], [2.1, 3.0]]
    assert mean.get_offsets().tolist() == [[2.0, 2.0]]
    ends = interval.get_segments()[0][:, 1]
    assert ends == pytest.approx([2 - 4.30265 / 3**0.5, 2 + 4.30265 / 3**0.5], abs=1e-4)  # t of 2 degrees, SD 1
    plt.close(figure)


def test_one_seed_is_a_point_without_an_interval():
    figure, axes = plt.subplots()
    figures.draw_seeds(axes, 2.0, [1.0], looks.LOOKS["lora"])
    assert len(axes.collections) == 1
    scores = {"increlora": {41: 2.0}, "uniform": {41: 1.0}}
    figures.draw_differences(axes, 0, comparison.compare(scores, "increlora", "uniform"), looks.LOOKS["uniform"])
    assert axes.collections[1].get_facecolor().tolist() == [[1, 1, 1, 1]]
    figures.draw_with_median(axes, 0, [1.0], looks.LOOKS["lora"])
    assert len(axes.collections) == 3
    assert interval_text([1.0]) == "n too small"
    assert interval_text([1.0, 2.0, 3.0]) == "[-0.48, 4.48]"
    plt.close(figure)


def test_cells_of_a_rank_map_are_written_out():
    figure, axes = plt.subplots()
    figures.draw_rank_map(axes, np.array([[1, 2], [0, 4]]), [0, 1], ["q", "k"], 4)
    assert [text.get_text() for text in axes.texts] == ["1", "2", "0", "4"]
    figures.draw_rank_map(axes, np.array([[1.5, 2.0]]), [0], ["q", "k"], 4)
    assert [text.get_text() for text in axes.texts[4:]] == ["1.5", "2.0"]
    plt.close(figure)
