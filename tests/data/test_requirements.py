"""What later stages require of the data is found by the manifest, with a remedy that helps."""

import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.config import Params
from pipeline.data.layout import UNASSIGNED
from pipeline.data.manifest import DataError, Item
from pipeline.data.requirements import check_requirements, problems, unwatched_weights, warnings
from pipeline.data.splits import split_test, split_validation
from pipeline.stage.presets import load_preset
from tests.imports import ROOT

View = tuple[str, str, str]
"""Identity, camera and split."""


def params_of(**changes: Any) -> Params:
    """Preset smoke for own images, with other values by dotted name (`__` for the dot)."""
    content = load_preset(ROOT, "smoke").model_dump()
    for name, value in {"data__source": "folder", "data__validation": 0.0, **changes}.items():
        *path, last = name.split("__")
        section = content
        for key in path:
            section = section[key]
        section[last] = value
    return Params.model_validate(content)


def items_of(views: Iterable[View]) -> list[Item]:
    return [Item(f"{number}.jpg", *view) for number, view in enumerate(views)]


def own(identities: int, cameras: str, params: Params, images: int = 1) -> list[Item]:
    """Split images as stage `prepare` does."""
    views = [(f"car{n}", camera, UNASSIGNED) for n in range(identities) for camera in cameras for _ in range(images)]
    data = params.data
    items = split_test(items_of(views), data.custom.test, params.seed, data.protocol)
    return split_validation(items, data.validation, params.seed, data.protocol)


TRAIN = [(str(n), camera, "train") for n in range(6) for camera in "ab"]
TEST = [(f"t{n}", camera, split) for n in range(3) for camera, split in (("a", "query"), ("b", "gallery"))]


def test_ordinary_data_have_no_problem_and_no_warning() -> None:
    params = params_of(student__batch__instances=2, teacher__batch__instances=2)
    assert list(problems(items_of(TRAIN + TEST), params)) == []
    assert list(warnings(items_of(TRAIN + TEST), params)) == []


def test_a_batch_with_more_identities_than_are_left_is_refused_with_both_numbers() -> None:
    params = params_of(student__batch__identities=16, data__validation=0.2, data__custom__test=0.3)
    items = own(20, "ab", params, images=3)
    left = len({item.identity for item in items if item.split == "train"})
    (problem,) = problems(items, params)
    assert problem.startswith(
        f"`student.batch.identities` (16) must not exceed the {left} identities left for training"
    )
    assert problem.endswith(f"set `student.batch.identities` to {left} or less")
    assert list(problems(items, params_of(student__batch__identities=left, data__custom__test=0.3))) == []


def test_all_problems_are_listed_at_once() -> None:
    params = params_of(student__batch__identities=16, teacher__batch__identities=12)
    views = [*TRAIN, ("t0", "a", "query"), ("t1", "b", "gallery"), ("v", "a", "validation-query")]
    with pytest.raises(DataError) as error:
        check_requirements(items_of([*views, ("v", "a", "validation-gallery")]), params)
    lines = str(error.value).splitlines()
    assert [line.partition(" ")[0] for line in lines[:2]] == [
        "`teacher.batch.identities`",
        "`student.batch.identities`",
    ]
    assert "test set" in lines[2] and "validation set" in lines[3] and len(lines) == 4
    assert error.value.exit_code == 3


@pytest.mark.parametrize("protocol", ["market", "query-gallery", "loo"])
def test_one_camera_is_refused_with_a_protocol_that_helps(protocol: str) -> None:
    params = params_of(data__protocol=protocol)
    found = list(problems(own(20, "a", params, images=3), params))
    if protocol == "market":
        (problem,) = found
        assert "all images are of one camera: set `data.protocol` to query-gallery, or to loo" in problem
        assert "data.custom.test" not in problem
    else:
        assert found == []


def test_more_test_identities_are_suggested_only_if_they_help() -> None:
    params = params_of(data__custom__test=0.02)
    items = own(20, "ab", params, images=3)
    assert len({item.identity for item in items if item.split != "train"}) < 2
    (problem,) = problems(items, params)
    assert "needs two identities" in problem and "raise `data.custom.test` (0.02)" in problem
    more = params_of(data__custom__test=0.5)
    assert list(problems(own(20, "ab", more, images=3), more)) == []
    few = params_of(data__custom__test=0.1, teacher__batch__identities=2, student__batch__identities=2)
    (problem,) = problems(items_of([*TRAIN[:4], *TEST[:2]]), few)
    assert problem.endswith("add identities") and "raise" not in problem


@pytest.mark.parametrize(
    ("protocol", "test", "message"),
    [
        ("loo", [("8", "a", "query"), ("8", "a", "gallery"), ("9", "a", "query")], "but 1 are in a gallery"),
        ("market", [("8", "?", "gallery"), ("9", "unknown", "gallery")], "1 have none, .* query-gallery"),
        ("market", [("8", "a", "query"), ("9", "b", "query")], "6 training identities have one: raise"),
        ("market", [("8", "a", "query"), ("8", "b", "gallery")], r"needs two identities, and it has 1 \(2 images\)"),
        ("market", [("8", "a", "query"), ("-1", "b", "gallery")], "needs two identities, and it has 1"),
        ("market", [("8", "a", "query"), ("9", "a", "gallery")], "no query of the test set .* from another camera"),
        (
            "market",
            [("8", "a", "gallery"), ("8", "b", "gallery"), ("9", "a", "query")],
            "put one image of an identity into `query`",
        ),
        ("market", [("8", "a", "query"), ("8", "a", "gallery"), ("9", "a", "gallery")], "raise `data.custom.test`"),
        ("query-gallery", [("8", "a", "query"), ("9", "a", "gallery")], "a gallery image of its identity; 6 training"),
        ("loo", [("8", "a", "query"), ("9", "a", "query")], "another image of its identity"),
        ("vehicleid", [("8", "a", "query"), ("9", "a", "query")], "another image of its identity"),
        ("loo", [], r"no image is in the test set"),
        ("loo", [("8", "a", "query"), ("9", "a", "query"), ("-1", "a", "query")], "junk and cannot be a query"),
    ],
)
def test_a_test_set_that_cannot_be_scored_is_refused(protocol: str, test: list[View], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_requirements(items_of(TRAIN + test), params_of(data__protocol=protocol))


def test_a_source_with_one_protocol_gets_no_other_one_as_the_remedy() -> None:
    test = [("8", "a", "query"), ("9", "a", "gallery")]
    train = [(identity, "a", split) for identity, _, split in TRAIN]
    (problem,) = problems(items_of(train + test), params_of(data__source="market1501"))
    assert "set `data.protocol`" not in problem and "source market1501 needs them" in problem


def test_no_training_identity_is_a_problem_of_its_own() -> None:
    (problem,) = problems(items_of([("1", "a", "train"), *TEST]), params_of())
    assert problem.startswith("training needs two identities, and there are 1 identities left for training (of 4: 3")
    assert problem.endswith("lower `data.custom.test`, or add identities")


@pytest.mark.parametrize(
    ("views", "changes", "message"),
    [
        (TRAIN, {"data__validation": 0.1}, r"`data.validation` is 0.1 of 6 training identities; 0.17 holds out one"),
        (
            [(name, "a", split) for name, _, split in TRAIN],
            {"data__validation": 0.2},
            "no query of them .* another cam",
        ),
        ([*TRAIN, ("v", "a", "validation-query"), ("v", "b", "validation-gallery")], {}, "mAP is always 1"),
        (TRAIN, {"teacher__batch__instances": 3}, r"6 of 6 .* `teacher.batch.instances` \(3\)"),
        (TRAIN, {"benchmark__panels": 5}, "is 5, but queries of the test set: 3"),
        (
            [*TRAIN, ("unlabelled", "unknown", "unlabelled")],
            {"student__batch__unlabelled": 0},
            "not used, because `student.batch.unlabelled` is 0",
        ),
        (TRAIN, {"teacher__weights": "nowhere.pth"}, "`teacher.weights` is nowhere.pth, which is not a file"),
    ],
)
def test_what_is_probably_not_intended_is_a_warning(views: list[View], changes: dict[str, Any], message: str) -> None:
    params = params_of(**({"teacher__batch__instances": 2, "student__batch__instances": 2} | changes))
    items = items_of(views + TEST)
    assert list(problems(items, params)) == []
    (warning,) = warnings(items, params)
    assert re.search(message, warning)


def test_an_identity_around_a_folder_without_labels_is_a_warning() -> None:
    params = params_of(data__unlabelled=["old/north", "street"], student__batch__unlabelled=4)
    paths = {"car/a.jpg": "car", "old/b.jpg": "old", "old/south/c.jpg": "old"}
    items = [Item(path, identity, "a", "train") for path, identity in paths.items()]
    found = [warning for warning in warnings(items, params) if "count as those of an identity" in warning]
    assert [warning.partition(" count")[0] for warning in found] == ["images in old", "images in old/south"]
    assert found[0].endswith("although old/north is in `data.unlabelled`; add old to it, or move them")


def test_a_split_that_is_listed_as_unlabelled_is_named() -> None:
    params = params_of(data__unlabelled=["extra", "train"])
    assert next(problems(items_of(TEST), params)).startswith(
        "no image is in the training set; remove its folder from `data.unlabelled` (extra, train), or give images"
    )


def test_unlabelled_images_without_a_distillation_loss_are_refused() -> None:
    with pytest.raises(
        ValidationError, match=r"`batch.unlabelled` \(4\) must be 0 if `distill.kl`, `distill.feature` and "
    ):
        params_of(student__batch__unlabelled=4, student__distill__kl=0.0, student__distill__feature=0.0)


def test_a_mean_over_one_view_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"`average_views` needs at least 2 `views`, got 1"):
        params_of(student__distill__views=1, student__distill__average_views=True)


def test_a_stem_that_the_network_cannot_have_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"`teacher\.stem` must be 0 or 16 at `teacher\.depth` 18, got 32"):
        params_of(teacher__depth=18, teacher__width=16, teacher__stem=32)
    with pytest.raises(ValidationError, match="publishes no ResNet-50 of width 64 and stem 32"):
        params_of(teacher__depth=50, teacher__width=64, teacher__stem=32, teacher__weights="imagenet")


def test_the_remedy_of_a_missing_validation_helps() -> None:
    params = params_of(data__validation=0.17, data__custom__test=0.5)
    held_out = split_validation(items_of(TRAIN), 0.17, 0, "market")
    assert any(item.split == "validation-query" for item in held_out)
    assert not any("no identity is held out" in text for text in warnings(held_out, params))


def test_a_hundred_thousand_images_are_checked_within_seconds(tmp_path: Path) -> None:
    params = params_of(data__validation=0.1)
    items = own(5000, "abcde", params, images=4)
    began = time.monotonic()
    assert list(problems(items, params)) == []
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("weights", "seen"),
    [
        ("weights/teacher/a.pth", True),
        ("weights/teacher/link.pth", True),
        ("a.pth", False),
        ("weights/student/a.pth", False),
    ],
)
def test_weights_that_dvc_does_not_watch_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str, seen: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("weights/teacher", "weights/student"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("a.pth", "weights/teacher/a.pth", "weights/student/a.pth"):
        (tmp_path / file).touch()
    (tmp_path / "weights" / "teacher" / "link.pth").symlink_to(tmp_path / "a.pth")  # as DVC may put it
    warning = unwatched_weights("teacher", params_of(teacher__weights=weights))
    message = (
        f"`teacher.weights` is {weights}: put it into weights/teacher/, because DVC does not see it change elsewhere"
    )
    assert warning == (None if seen else message)
    assert unwatched_weights("student", params_of(student__init="a.pth", student__method="static-random")) is None
