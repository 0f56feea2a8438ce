"""Time and memory are those of real steps, and what goes wrong in them is one sentence."""

import time
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config import Params
from pipeline.data.manifest import UNLABELLED, Item, Manifest
from pipeline.preview import estimate as module
from pipeline.preview.estimate import EstimateError, Measured, Timed, estimate
from pipeline.stage.presets import load_preset
from tests import layouts
from tests.imports import ROOT


def params_of(**changes: object) -> Params:
    content = load_preset(ROOT, "smoke").model_dump()
    for name, value in changes.items():
        *path, last = name.split("__")
        section = content
        for key in path:
            section = section[key]
        section[last] = value
    return Params.model_validate(content)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Ten identities to train on, two to validate and three to test; two images by each of two cameras."""
    items = []
    for identity in range(15):
        for camera in "ab":
            for view in range(2):
                side = "query" if view == 0 else "gallery"
                split = "train" if identity < 10 else f"validation-{side}" if identity < 12 else side
                path = f"{identity}{camera}{view}.png"
                layouts.picture(tmp_path / path, identity, "ab".index(camera), view)
                items.append(Item(path, f"id{identity}", camera, split))
    return Manifest(items, tmp_path)


def test_the_steps_are_those_of_the_training_and_their_time_is_multiplied(manifest: Manifest) -> None:
    params = params_of(teacher__epochs=50)
    result = estimate("teacher", params, manifest)
    timed = result.measured.whole
    assert result.steps == 50 * timed.steps == 50 * 5  # 10 identities, of which each has two chunks of 3; batches of 4
    assert result.measured.shrunk is None
    assert 0 < result.step[0] <= result.step[1]
    assert result.seconds[0] >= 250 * result.step[0] and result.seconds[1] >= 250 * result.step[1]
    assert 100 * 2**20 < result.measured.memory < 8 * 2**30


@pytest.mark.parametrize(("method", "shrinks"), [("budget", True), ("paper", False)])
def test_a_student_that_shrinks_is_measured_at_its_start_and_at_its_end(
    manifest: Manifest, method: str, shrinks: bool
) -> None:
    views = {} if shrinks else {"student__distill__views": 0}
    params = params_of(student__method=method, student__budget__of="latency" if shrinks else "macs", **views)
    result = estimate("student", params, manifest)
    assert (result.measured.shrunk is not None) is shrinks
    assert result.seconds[0] <= result.seconds[1]


def test_real_images_are_decoded_in_each_step_if_they_are_not_cached(manifest: Manifest) -> None:
    params = params_of(data__cache=False)
    assert estimate("teacher", params, manifest).steps
    path = manifest.root / manifest.items[0].path
    for item in manifest.items:
        (manifest.root / item.path).write_bytes(b"no picture")
    with pytest.raises(EstimateError, match=r"a training step failed: .*cannot identify image file"):
        estimate("teacher", params, manifest)
    assert path.exists()


def test_a_step_that_takes_too_long_gives_a_lower_bound(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LIMIT", 0.0)
    began = time.monotonic()
    with pytest.raises(EstimateError, match=r"one step takes more than 25 s, so all 400 take more than 2.8 h; use a"):
        estimate("teacher", params_of(teacher__epochs=100), manifest)
    assert time.monotonic() - began < 60


def measured(whole: list[float], shrunk: list[float] | None = None) -> Measured:
    rest = {"steps": 10, "epoch": 0.5, "image": 0.01, "teacher": 0.02}
    parts = {name: values and Timed(seconds=values, **rest) for name, values in (("whole", whole), ("shrunk", shrunk))}
    return Measured(**parts, memory=1, device_memory=None, threads=1)


def test_the_times_are_bounds_of_steps_epochs_and_evaluations(manifest: Manifest) -> None:
    params = params_of(student__epochs=4, student__validate_every=3)  # validated after epochs 3 and 4
    views = 2 * len(manifest.indices("train"))  # the preset stores the outputs of the teacher for two views
    rest = 4 * 0.5 + 0.01 * (2 * 8 + 12) + 0.02 * views
    same = module._extrapolate("student", params, manifest, measured([2.0, 2.0, 2.0]))
    assert same.seconds == pytest.approx((80 + rest, 80 + rest))
    shrinks = module._extrapolate("student", params, manifest, measured([2.0] * 5, [0.5] * 5))
    assert shrinks.seconds == pytest.approx((20 + rest, 80 + rest))
    spread = module._extrapolate("student", params, manifest, measured([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert spread.step == (2.0, 4.0)
    stalled = module._extrapolate("student", params, manifest, measured([1.0] * 9 + [91.0]))
    assert stalled.step == (1.0, 10.0)


def test_the_teacher_embeds_the_views_of_images_without_labels_too(manifest: Manifest) -> None:
    more = [replace(item, path=f"more/{item.path}", identity=UNLABELLED, split=UNLABELLED) for item in manifest.items]
    larger = Manifest([*manifest.items, *more], manifest.root)
    steps, per_view = measured([2.0]), 2 * 0.02
    for unlabelled, further in ((4, len(more)), (0, 0)):
        params = params_of(student__batch__unlabelled=unlabelled)
        plain, with_more = (module._extrapolate("student", params, part, steps) for part in (manifest, larger))
        assert with_more.seconds[0] - plain.seconds[0] == pytest.approx(per_view * further)
