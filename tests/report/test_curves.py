"""Training curves."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from pipeline.report.curves import loss_names, plot_capacity, plot_training, read_curves

STUDENT = """epoch,loss,kl,macs_reduction,params_reduction,target_reduction,validation_map
1,2.5,0.5,0.0,0.0,0.1,
2,1.5,0.25,0.5,0.4,0.5,0.6
3,1.25,0.125,0.65,0.62,0.65,
4,1.0,0.1,0.65,0.62,0.65,0.7
"""
TEACHER = "epoch,loss,triplet,validation_map\n1,3.0,1.0,0.2\n2,2.0,0.5,0.5\n"


@pytest.fixture
def student(tmp_path):
    (tmp_path / "student.csv").write_text(STUDENT)
    return read_curves(tmp_path / "student.csv")


@pytest.fixture
def teacher(tmp_path):
    (tmp_path / "teacher.csv").write_text(TEACHER)
    return read_curves(tmp_path / "teacher.csv")


def lines(axes):
    return {line.get_label(): line for line in axes.get_lines()}


def test_an_empty_cell_is_read_as_nan(student):
    assert_array_equal(student["validation_map"], [np.nan, 0.6, np.nan, 0.7])
    assert_array_equal(student["epoch"], [1, 2, 3, 4])


def test_all_other_columns_are_losses(student, teacher):
    assert loss_names(student) == ["loss", "kl"]
    assert loss_names(teacher) == ["loss", "triplet"]


def test_rows_of_compactors_have_charts_behind_the_losses(student, teacher):
    student |= {"masked_rows": np.array([0.0, 0.1, 0.2, 0.3]), "norm_of_other_rows": np.ones(4)}
    assert loss_names(student) == ["loss", "kl"]
    charts = [axes.get_title(loc="left") for axes in plot_training(teacher, student).axes]
    assert charts == ["validation mAP", "loss", "triplet", "kl", "masked rows", "norm of other rows"]


def test_a_file_without_epochs_is_an_error(tmp_path):
    (tmp_path / "student.csv").write_text("epoch,loss\n")
    with pytest.raises(ValueError, match=r"student\.csv"):
        read_curves(tmp_path / "student.csv")


def test_capacity_is_one_minus_the_reductions(student):
    remaining, score = plot_capacity(student).axes
    drawn = lines(remaining)
    assert_array_equal(drawn["MACs"].get_ydata(), 1 - student["macs_reduction"])
    assert_array_equal(drawn["parameters"].get_ydata(), 1 - student["params_reduction"])
    assert_array_equal(drawn["allowed by the schedule"].get_ydata(), 1 - student["target_reduction"])
    assert remaining.get_ylim()[0] == 0
    assert_array_equal(lines(score)["student"].get_xdata(), [2, 4])
    assert_array_equal(lines(score)["student"].get_ydata(), [0.6, 0.7])


def test_capacity_shows_the_columns_that_exist(student):
    del student["target_reduction"]
    student["latency_reduction"] = np.array([0.0, 0.3, 0.5, 0.5])
    remaining, _ = plot_capacity(student).axes
    assert set(lines(remaining)) == {"MACs", "parameters", "latency"}
    assert "latency_reduction" not in loss_names(student)


def test_training_has_a_chart_for_validation_and_each_loss_of_either_network(student, teacher):
    charts = {axes.get_title(loc="left"): lines(axes) for axes in plot_training(teacher, student).axes}
    assert list(charts) == ["validation mAP", "loss", "triplet", "kl"]
    assert set(charts["loss"]) == {"teacher", "student"}
    assert set(charts["triplet"]) == {"teacher"}
    assert set(charts["kl"]) == {"student"}
    assert_array_equal(charts["validation mAP"]["student"].get_xdata(), [2, 4])


def test_without_validation_the_other_charts_remain(student, teacher):
    for curves in (student, teacher):
        del curves["validation_map"]
    (remaining,) = plot_capacity(student).axes
    assert remaining.get_xlabel() == "epoch"
    titles = [axes.get_title(loc="left") for axes in plot_training(teacher, student).axes]
    assert titles == ["loss", "triplet", "kl"]
