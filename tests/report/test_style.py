"""What all pictures have in common."""

import matplotlib
from PIL import Image

from pipeline.report.pareto import Point, pareto
from pipeline.report.style import new_figure, save, styled


def test_the_same_figure_gives_the_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        save(pareto([Point("teacher", 0.5, 10)]), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_the_style_ends_with_its_block_and_ignores_the_users(tmp_path):
    with matplotlib.rc_context({"lines.linewidth": 9.0, "axes.facecolor": "black"}):
        with styled():
            assert matplotlib.rcParams["axes.facecolor"] == "white"
            assert matplotlib.rcParams["lines.linewidth"] != 9.0
        assert matplotlib.rcParams["lines.linewidth"] == 9.0


def test_pictures_are_sharp_enough_for_twice_the_width_of_a_phone(tmp_path):
    with styled():
        save(new_figure(1.0), tmp_path / "empty.png")
    with Image.open(tmp_path / "empty.png") as image:
        assert image.width >= 2 * 390
