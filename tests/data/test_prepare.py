"""Stage `prepare`, called as a function."""

import csv
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipeline.config import Custom, Data, VehicleId, Vehicles
from pipeline.data.images import open_images
from pipeline.data.manifest import DataError
from pipeline.files import Files
from pipeline.stage.presets import load_preset
from stages.prepare import prepare
from tests import layouts
from tests.imports import ROOT


def with_batch(params, identities, stages=("teacher", "student")):
    """Params with batches of that many identities with two images each."""
    for name in stages:
        section = getattr(params, name)
        batch = section.batch.model_copy(update={"identities": identities, "instances": 2})
        params = params.model_copy(update={name: section.model_copy(update={"batch": batch})})
    return params


class Run(SimpleNamespace):
    """The attributes of a run that the stage uses."""

    def __init__(self, root, **data):
        size = Vehicles(train_identities=4, test_identities=2, unlabelled_identities=0, views=2, size=16)
        held_out = 0.0 if "source" in data else 0.5
        defaults = {
            "source": "vehicles",
            "root": "data",
            "unlabelled": [],
            "image_size": [20, 16],
            "cache": True,
            "validation": held_out,
        }
        limits = {"max_quarantined": 0.0, "max_leaked": 0.0, "closed_set": False, "near_duplicate_bits": 4}
        sources = {
            "vehicleid": VehicleId(test_identities=800),
            "custom": Custom(table="images.csv", pattern="", test=0.5),
        }
        settings = Data(**{**defaults, "protocol": "market", **limits, "vehicles": size, **sources, **data})
        files = Files(root, root)
        params = with_batch(load_preset(ROOT, "smoke"), 2).model_copy(update={"data": settings})
        super().__init__(params=params, files=files, seconds={})

    def timing(self, name, seconds):
        self.seconds[name] = seconds


@pytest.fixture
def veri(tmp_path, picture):
    """Two training and two test identities in the layout of VeRi-776."""
    names = {
        "train": [
            f"000{identity}_c00{camera}_0000000{view}_0.jpg" for identity in "12" for camera in "12" for view in "01"
        ],
        "query": ["0003_c001_00000000_0.jpg"],
        "test": ["0003_c001_00000001_0.jpg", "0003_c002_00000000_0.jpg", "0004_c002_00000000_0.jpg"],
    }
    seed = 0
    for part, listed in names.items():
        for name in listed:
            picture(tmp_path / "data" / f"image_{part}" / name, seed := seed + 1)
        (tmp_path / "data" / f"name_{part}.txt").write_text("\n".join(listed))
    return tmp_path


def test_the_default_set_is_rendered_split_and_cached(tmp_path):
    run = Run(tmp_path)
    counts = prepare(run).model_dump()
    assert counts == {
        **{"images": 72, "identities": 6, "cameras": 6, "train": 24, "validation": 24},
        **{"query": 4, "gallery": 20, "quarantined": 0, "leaked": 0, "near_duplicates": counts["near_duplicates"]},
        **{"test_identities": 2, "seen_identities": 0, "unlabelled": 0, "unlabelled_removed": 0},
    }
    outs = {path.relative_to(tmp_path / "artifacts") for path in (tmp_path / "artifacts").glob("*/*")}
    assert {path.name for path in outs} == {"vehicles", "manifest.csv", "images.npy", "quarantine.csv"}
    assert (tmp_path / "artifacts" / "warnings.csv").read_text().startswith("path,warning,detail\n")
    manifest, images = open_images(run.files, run.params)
    assert images.batch(manifest.indices("query")).shape == (4, 20, 16, 3)
    assert len(manifest.indices("validation-query")) == 12
    assert "render" in run.seconds


def test_the_rendered_set_of_an_earlier_run_is_replaced(tmp_path):
    larger = {"train_identities": 4, "test_identities": 3, "unlabelled_identities": 1, "views": 3, "size": 16}
    prepare(Run(tmp_path, vehicles=Vehicles(**larger)))
    (tmp_path / "artifacts/prepare/vehicles/image_train/0001_c001_00000000_0.jpg").write_bytes(b"half")
    assert prepare(Run(tmp_path)).images == 72
    files = [path for path in (tmp_path / "artifacts/prepare/vehicles").rglob("*") if path.is_file()]
    assert len(files) == 72 + 3  # none of the third test identity, of the unlabelled one, and of the third view


def test_raw_images_are_read_from_data_root(veri):
    run = Run(veri, source="veri776", cache=False)
    assert prepare(run).train == 8
    manifest, images = open_images(run.files, run.params)
    assert manifest.root == veri / "data" and not run.files.image_cache.exists()
    assert images.batch(np.arange(12)).shape == (12, 20, 16, 3)
    manifest_before, pixels_before = run.files.manifest.read_bytes(), run.files.pixels.read_bytes()
    path = next((veri / "data" / "image_train").iterdir())
    ImageOps.invert(Image.open(path).convert("RGB")).save(path)
    prepare(run)
    assert run.files.manifest.read_bytes() == manifest_before and run.files.pixels.read_bytes() != pixels_before


def test_unreadable_images_are_listed_and_skipped_up_to_the_limit(veri):
    broken = veri / "data" / "image_train" / "0001_c001_00000000_0.jpg"
    broken.write_bytes(broken.read_bytes()[:400])
    with pytest.raises(DataError, match=r"1 of 12 images .*max_quarantined.*0001_c001_00000000_0.jpg") as error:
        prepare(Run(veri, source="veri776", max_quarantined=0.08))
    assert error.value.exit_code == 3 and not Files(veri, veri).manifest.exists()
    with Files(veri, veri).quarantine.open() as file:
        (row,) = csv.DictReader(file)
    assert row["path"] == "image_train/0001_c001_00000000_0.jpg" and "truncated" in row["reason"].lower()
    assert prepare(Run(veri, source="veri776", max_quarantined=0.1)).quarantined == 1


def test_a_test_image_that_is_a_training_image_stops_the_stage(veri):
    source = veri / "data" / "image_train" / "0002_c002_00000001_0.jpg"
    (veri / "data" / "image_test" / "0003_c002_00000000_0.jpg").write_bytes(source.read_bytes())
    with pytest.raises(
        DataError, match=r"1 of 4 test images.*max_leaked.*image_test/0003_c002_00000000_0.jpg = image_tr"
    ):
        prepare(Run(veri, source="veri776"))
    assert not Files(veri, veri).manifest.exists()
    record = prepare(Run(veri, source="veri776", max_leaked=0.5))
    assert (record.leaked, record.gallery) == (1, 3)
    with Files(veri, veri).warnings.open() as file:
        warnings = {row["path"]: (row["warning"], row["detail"]) for row in csv.DictReader(file)}
    assert warnings["image_test/0003_c002_00000000_0.jpg"] == (
        "has the same pixels as a training image",
        "image_train/0002_c002_00000001_0.jpg",
    )


def test_an_image_that_changes_while_it_is_read_stops_the_stage(veri, monkeypatch):
    def modify_an_image(manifest, *_):
        path = manifest.root / manifest.items[3].path
        path.write_bytes(path.read_bytes() + b" ")

    monkeypatch.setattr("stages.prepare.build_cache", modify_an_image)
    with pytest.raises(DataError, match=r"1 images changed while they were read: image_train/.*; run the stage again"):
        prepare(Run(veri, source="veri776"))
    assert not Files(veri, veri).manifest.exists()


def test_custom_data_without_splits_are_split(tmp_path):
    layouts.folder(tmp_path / "data", 12, 0)
    record = prepare(Run(tmp_path, source="folder", validation=0.2))
    assert record.train + record.validation + record.query + record.gallery == record.images == 72
    assert record.query == record.gallery > 0  # two views in each of three cameras
    all_queries = prepare(Run(tmp_path, source="folder", protocol="loo", validation=0.2))
    assert (all_queries.gallery, all_queries.query) == (0, record.query + record.gallery)


def test_a_batch_that_cannot_be_filled_stops_the_stage_before_images_are_cached(tmp_path):
    layouts.folder(tmp_path / "data", 12, 0)
    run = Run(tmp_path, source="folder", validation=0.2)
    run.params = with_batch(run.params, 16, ("student",))
    with pytest.raises(DataError, match=r"`student.batch.identities` \(16\) must not exceed the \d identities left"):
        prepare(run)
    assert not run.files.image_cache.exists() and not run.files.manifest.exists()


def test_equal_images_of_two_identities_are_unusable(tmp_path):
    layouts.folder(tmp_path / "data", 8, 0)
    for thing in ("thing 1", "thing 2"):
        layouts.picture(tmp_path / "data" / thing / "cam1" / "same.png", 99)
    with pytest.raises(DataError, match=r"2 of 50 images are unusable.*has the same pixels as"):
        prepare(Run(tmp_path, source="folder", custom=Custom(table="images.csv", pattern="", test=0.01)))


def write_table(root, rows, header=("path", "identity", "camera", "split")):
    for path, identity, camera, *_ in rows:
        layouts.picture(root / path, int(identity), ord(camera), int(path.split("/")[-1][0]))
    (root / "images.csv").write_text("".join(",".join(row) + "\n" for row in (header, *rows)))


def test_identities_of_the_test_set_are_trained_on_only_if_the_parameter_allows_it(tmp_path):
    words = {0: "query", 1: "gallery", 2: "train"}
    write_table(
        tmp_path / "data",
        [(f"{i}/{c}/{v}.png", str(i), c, words[v]) for i in range(6) for c in "ab" for v in range(3)],
    )
    with pytest.raises(DataError, match=r"identities in training and in test: 0, 1, 2 and 3 more; .*`data.closed_set`"):
        prepare(Run(tmp_path, source="csv", validation=0.0))
    record = prepare(Run(tmp_path, source="csv", validation=0.0, closed_set=True))
    assert (record.train, record.query, record.gallery, record.seen_identities) == (12, 12, 12, 6)
    assert open_images(Files(tmp_path, tmp_path), Run(tmp_path, source="csv").params)[0].seen_identities == 6


def test_an_allowed_closed_set_that_is_none_is_not_called_one(tmp_path):
    layouts.folder(tmp_path / "data", 12, 0)
    assert prepare(Run(tmp_path, source="folder", closed_set=True)).seen_identities == 0


@pytest.mark.parametrize(("protocol", "queries"), [("market", 4), ("query-gallery", 2), ("loo", 12)])
def test_a_validation_split_of_the_user_is_the_validation_and_nothing_more_is_held_out(tmp_path, protocol, queries):
    words = ["Train"] * 4 + ["VAL"] * 2 + ["Test"] * 3
    write_table(
        tmp_path / "data",
        [(f"{i}/{c}/{v}.png", str(i), c, word) for i, word in enumerate(words) for c in "ab" for v in range(3)],
    )
    run = Run(tmp_path, source="csv", validation=0.5, protocol=protocol)
    record = prepare(run)
    assert (record.train, record.validation, record.query + record.gallery) == (24, 12, 18)
    manifest, _ = open_images(run.files, run.params)
    assert {item.identity for item in manifest.items if item.split.startswith("validation")} == {"4", "5"}
    assert len(manifest.indices("validation-query")) == queries


def test_a_validation_split_without_a_match_is_refused(tmp_path):
    words = ["train"] * 4 + ["val"] * 2 + ["test"] * 3
    write_table(
        tmp_path / "data",
        [(f"{i}/{c}/{v}.png", str(i), "a" if word == "val" else c, word)
         for i, word in enumerate(words) for c in "ab" for v in range(3)],
    )  # fmt: skip
    with pytest.raises(DataError, match="no identity of the validation split has two images in two cameras"):
        prepare(Run(tmp_path, source="csv"))


def test_a_thousand_warnings_of_one_kind_do_not_hide_one_of_another(tmp_path, caplog):
    layouts.folder(tmp_path / "data", 12, 0)
    for number in range(1000):
        (tmp_path / "data" / "thing 1" / f"._{number}.png").touch()
    layouts.picture(tmp_path / "data" / "thing 2" / "cam1" / "renamed.png", 2, 1, 7)
    (tmp_path / "data" / "thing 2" / "cam1" / "renamed.png").rename(tmp_path / "data" / "thing 2" / "cam1" / "r.jpg")
    prepare(Run(tmp_path, source="folder", near_duplicate_bits=-1))
    lines = [record.getMessage() for record in caplog.records if record.name == "stages.prepare"]
    assert lines == [
        "skipped: left behind by an operating system (1000): such as thing 1/._0.png",
        "the suffix is not that of the format (1): thing 2/cam1/r.jpg (is PNG)",
    ]


def test_pictures_of_phones_are_ordinary(tmp_path):
    layouts.folder(tmp_path / "data", 12, 0)
    for path in sorted((tmp_path / "data" / "thing 1").rglob("*.png")):
        image = Image.open(path)
        image.save(path.with_suffix(".jpg"), format="MPO", save_all=True, append_images=[image.rotate(5)])
        path.unlink()
    record = prepare(Run(tmp_path, source="folder", near_duplicate_bits=-1))
    assert record.images == 72
    assert (tmp_path / "artifacts" / "warnings.csv").read_text() == "path,warning,detail\n"
