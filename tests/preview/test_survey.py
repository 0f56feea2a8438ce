"""The survey lists everything, decodes a sample, and writes nothing."""

import time
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from pipeline.config import Params
from pipeline.data.folders import NO_IMAGE
from pipeline.data.layout import UNASSIGNED
from pipeline.data.manifest import UNLABELLED, Item, by_kind
from pipeline.preview import survey as module
from pipeline.preview.sheet import IMAGES, chosen, shortened, write_sheet
from pipeline.preview.survey import evenly, sample, survey
from pipeline.stage.presets import load_preset
from tests import layouts
from tests.imports import ROOT


def params_of(**data: object) -> Params:
    smoke = load_preset(ROOT, "smoke").model_dump()
    smoke["data"] |= {"source": "folder", "validation": 0.2, **data}
    return Params.model_validate(smoke)


def items_of(sizes: list[int]) -> list[Item]:
    return [
        Item(f"{name}/{number}.png", f"id{name}", "a", UNASSIGNED)
        for name, size in enumerate(sizes)
        for number in range(size)
    ]


def state(root: Path) -> list[tuple[str, int, int]]:
    return sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in root.rglob("*"))


def test_a_folder_is_counted_by_split_as_stage_prepare_splits_it(tmp_path: Path) -> None:
    layouts.folder(tmp_path, 12, 0)
    before = state(tmp_path)
    found = survey(params_of(), tmp_path)
    assert state(tmp_path) == before
    counts = {row["split"]: row for row in found.counts}
    assert counts["all"] == {"split": "all", "images": "72", "identities": "12", "cameras": "3"}
    assert sum(int(row["images"]) for name, row in counts.items() if name != "all") == 72
    assert {"train", "query", "gallery"} <= set(counts)
    assert (len(found.decoded), found.unreadable, found.missing, found.problems) == (72, [], [], [])
    assert found.seconds > 0


def test_unlabelled_images_are_counted_and_sampled_apart(tmp_path: Path) -> None:
    layouts.folder(tmp_path, 12, 0)
    before = survey(params_of(), tmp_path)
    for number in range(130):
        layouts.picture(tmp_path / "street" / f"{number:03}.png", 500 + number, size=(9, 9))
    (tmp_path / "street" / "notes.txt").touch()
    found = survey(params_of(unlabelled=["street"]), tmp_path)
    counts = {row["split"]: row for row in found.counts}
    assert counts.pop(UNLABELLED) == {"split": UNLABELLED, "images": "130", "identities": "0", "cameras": "0"}
    assert counts.pop("all") == {"split": "all", "images": "202", "identities": "12", "cameras": "3"}
    assert list(counts.values()) == before.counts[:-1]
    assert Counter(item.split == UNLABELLED for item in found.decoded) == {False: 72, True: 100}
    assert (found.problems, found.notes) == (before.problems, before.notes)
    assert next(by_kind(found.warnings)) == f"{NO_IMAGE} (1): street/notes.txt"
    assert [item.split for item in chosen(found.decoded)].count(UNLABELLED) >= 4


def test_what_a_later_stage_refuses_is_a_problem_of_the_survey(tmp_path: Path) -> None:
    layouts.folder(tmp_path, 12, 0)
    params = params_of()
    batch = params.student.batch.model_copy(update={"identities": 16})
    params = params.model_copy(update={"student": params.student.model_copy(update={"batch": batch})})
    (problem,) = survey(params, tmp_path).problems
    assert problem.startswith("`student.batch.identities` (16) must not exceed")


def test_damaged_and_missing_images_and_warnings_by_kind_are_named(tmp_path: Path) -> None:
    layouts.folder(tmp_path, 12, 0)
    paths = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    (tmp_path / paths[0]).write_bytes((tmp_path / paths[0]).read_bytes()[:60])
    for number in range(3):
        (tmp_path / f"notes{number}.txt").touch()
    found = survey(params_of(), tmp_path)
    assert [path for path, _ in found.unreadable] == [paths[0]]
    assert next(by_kind(found.warnings)) == f"{NO_IMAGE} (3): such as notes0.txt"
    rows = [f"{path},{path.split('/')[0]},{path.split('/')[1]}" for path in [*paths, "thing 1/cam1/gone.png"]]
    (tmp_path / "images.csv").write_text("\n".join(["path,identity,camera", *rows]))
    assert survey(params_of(source="csv"), tmp_path).missing == ["thing 1/cam1/gone.png"]


@pytest.mark.parametrize(
    ("sizes", "each"),
    [
        ([10] * 1000, {0: 600, 1: 400}),  # images of an identity: identities with that many
        ([100] * 8, {50: 8}),
        ([1] * 10, {1: 10}),
        ([], {}),
    ],
)
def test_a_sample_is_spread_over_the_identities(sizes: list[int], each: dict[int, int]) -> None:
    items = items_of(sizes)
    drawn = sample(items, 400)
    assert len(set(drawn)) == len(drawn) == min(400, len(items))
    counts = Counter(item.identity for item in drawn)
    assert Counter(counts[f"id{name}"] for name in range(len(sizes))) == each
    assert sample(items, 400) == drawn


def test_a_sample_is_spread_over_the_images_of_an_identity() -> None:
    assert [int(Path(item.path).stem) for item in sample(items_of([100]), 4)] == [0, 25, 50, 75]
    assert evenly(range(3), 5) == [0, 1, 2]


def test_slow_images_end_the_sample_and_it_still_holds_many_identities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layouts.folder(tmp_path, 20, 0)
    monkeypatch.setattr(module, "CHUNK", 30)
    monkeypatch.setattr(module, "SECONDS", 0.0)
    found = survey(params_of(), tmp_path)
    assert len(found.decoded) == 30
    assert len({item.identity for item in found.decoded}) >= 15


def test_fifty_thousand_files_are_listed_split_and_checked_within_a_minute(tmp_path: Path) -> None:
    picture = tmp_path / "one.png"
    Image.effect_noise((32, 16), 60).save(picture)
    root = tmp_path / "data"
    for identity in range(2500):
        for camera in "abcd":
            folder = root / str(identity) / camera
            folder.mkdir(parents=True)
            for number in range(5):
                (folder / f"{number}.png").hardlink_to(picture)
    began = time.monotonic()
    found = survey(params_of(), root)
    assert time.monotonic() - began < 60
    assert found.counts[-1] == {"split": "all", "images": "50,000", "identities": "2,500", "cameras": "4"}
    assert (len(found.decoded), found.problems) == (400, [])


def test_the_sheet_shows_24_images_of_all_splits(tmp_path: Path) -> None:
    layouts.folder(tmp_path / "data", 12, 0)
    found = survey(params_of(), tmp_path / "data")
    assert write_sheet(tmp_path / "new" / "sheet.png", found.decoded, tmp_path / "data", (64, 32)) == IMAGES == 24
    with Image.open(tmp_path / "new" / "sheet.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000
    assert {item.split for item in chosen(found.decoded)} == {item.split for item in found.items}


def test_the_sheet_shows_fewer_images_if_there_are_no_more(tmp_path: Path) -> None:
    layouts.folder(tmp_path / "data", 2, 0)
    found = survey(params_of(), tmp_path / "data")
    assert write_sheet(tmp_path / "sheet.png", found.decoded, tmp_path / "data", (16, 16)) == len(found.items) < 24


def test_long_labels_and_dollars_are_drawn_as_they_are(tmp_path: Path) -> None:
    assert shortened("car") == "car"
    assert shortened("a" * 30 + "b" * 30) == "aaaaaaaaaa..bbbbbbbbbb"
    Image.new("RGB", (9, 9)).save(tmp_path / "1.png")
    write_sheet(tmp_path / "sheet.png", [Item("1.png", "$x_{", "\\frac$", "train")], tmp_path, (9, 9))
