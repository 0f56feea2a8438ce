"""The style of all charts."""

import matplotlib
from PIL import Image

from pipeline.report.pareto import Point, plot_pareto
from pipeline.report.style import new_figure, save, styled


def test_equal_figures_give_equal_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        save(plot_pareto([Point("teacher", 0.5, 10)]), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_the_style_applies_inside_its_block_only_and_ignores_the_users_settings(tmp_path):
    with matplotlib.rc_context({"lines.linewidth": 9.0, "axes.facecolor": "black"}):
        with styled():
            assert matplotlib.rcParams["axes.facecolor"] == "white"
            assert matplotlib.rcParams["lines.linewidth"] != 9.0
        assert matplotlib.rcParams["lines.linewidth"] == 9.0


def test_charts_have_twice_the_pixels_of_a_phone(tmp_path):
    with styled():
        save(new_figure(1.0), tmp_path / "empty.png")
    with Image.open(tmp_path / "empty.png") as image:
        assert image.width >= 2 * 390
