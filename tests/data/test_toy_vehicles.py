"""The default data set of rendered toy vehicles."""

import dataclasses
import hashlib
from collections import Counter

import numpy as np
import pytest
import trimesh
from PIL import Image

from pipeline.config import Vehicles
from pipeline.data.published import veri776
from pipeline.data.toy_vehicles import bodies, render

SMALL = Vehicles(train_identities=3, test_identities=2, unlabelled_identities=0, views=2, size=24)


def digests(folder):
    """Return the SHA-256 of every file of a data set."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set") / "vehicles"
    render.render(folder, 0, SMALL)
    return folder


def test_the_data_set_is_read_like_veri776(rendered):
    items = list(veri776(rendered, None))
    assert Counter(item.split for item in items) == {"train": 3 * 6 * 2, "query": 2 * 2, "gallery": 2 * (6 * 2 - 2)}
    assert {item.identity for item in items if item.split == "train"} == {"0001", "0002", "0003"}
    assert {item.identity for item in items if item.split != "train"} == {"0004", "0005"}
    assert {item.camera for item in items} == {f"c00{number}" for number in range(1, 7)}
    assert items[0].path == "image_train/0001_c001_00000000_0.jpg"


def test_queries_are_first_images_of_every_third_camera_and_not_in_the_gallery(rendered):
    items = list(veri776(rendered, None))
    queries = {(item.identity, item.camera) for item in items if item.split == "query"}
    assert queries == {("0004", "c001"), ("0004", "c004"), ("0005", "c002"), ("0005", "c005")}
    names = [item.path.split("/")[1] for item in items]
    assert len(set(names)) == len(names)


def test_images_are_jpeg_files_of_the_given_size_and_all_different(rendered):
    paths = sorted(rendered.rglob("*.jpg"))
    for path in paths:
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (24, 24))
            assert np.asarray(image).std() > 5
    assert len({path.read_bytes() for path in paths}) == len(paths) == 5 * 12


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_bytes(rendered, tmp_path):
    render.render(tmp_path / "again", 0, SMALL)
    assert digests(tmp_path / "again") == digests(rendered)
    render.render(tmp_path / "other", 1, SMALL)
    first, second = digests(rendered), digests(tmp_path / "other")
    assert first.keys() == second.keys()
    assert not any(first[name] == second[name] for name in first if name.endswith(".jpg"))


def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "precious.txt").touch()
    with pytest.raises(FileExistsError, match="move its files away"):
        render.render(tmp_path, 0, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_cameras_differ_in_all_settings():
    for seed in range(5):
        cameras = render.cameras(seed)
        assert len(cameras) == 6
        for name, minimal_range in (("pitch", 20), ("field_of_view", 10), ("blur", 0.4), ("noise", 0.01)):
            values = [getattr(camera, name) for camera in cameras]
            assert len(set(values)) == 6 and max(values) - min(values) > minimal_range
        assert all(np.linalg.norm(camera.sun) == pytest.approx(1) and camera.sun[2] > 0 for camera in cameras)


def test_lighting_and_shadows_follow_the_sun():
    """Trace a white block of 4 x 2 x 2 m on the road, with the sun in front of it at 45 degrees."""
    block = trimesh.creation.box((4, 2, 2))
    block.apply_translation((0, 0, 1))
    sun = np.array([1.0, 0.0, 1.0]) / 2**0.5
    camera = dataclasses.replace(render.cameras(0)[0], sun=sun, road=np.full(3, 0.5), sky=np.full(3, 0.9), line=50.0)
    eye = np.array([0.1, 0.2, 9.0])
    targets = {"roof": (1, 0, 2), "front road": (4, 0, 0), "shadow": (-3, 0, 0), "beyond the shadow": (-5, 0, 0)}
    towards = np.array([*(np.subtract(target, eye) for target in targets.values()), (1.0, 0.0, 0.1)])
    model = bodies.Model(block, np.ones((12, 3)))
    roof, front, shadow, beyond, sky = render._trace(model, camera, np.float32(eye), np.float32(towards))
    np.testing.assert_allclose(roof, 0.45 + 0.55 / 2**0.5, atol=1e-5)
    np.testing.assert_allclose(sky, 0.9, atol=1e-6)
    for road, light in ((front, 1.0), (shadow, 0.5), (beyond, 1.0)):
        assert any(np.allclose(road, 0.5 * light * check, atol=1e-5) for check in (0.84, 1.0))
    low = np.array([[-12.0, 0.2, 1.0]]), np.array([[1.0, 0.0, 0.0]])
    (rear,) = render._trace(model, camera, np.float32(low[0][0]), np.float32(low[1]))
    np.testing.assert_allclose(rear, 0.45, atol=1e-6)


@pytest.mark.parametrize("kind", bodies.KINDS)
def test_a_body_stands_on_the_road_and_its_solids_face_outwards(kind, monkeypatch):
    monkeypatch.setattr(bodies, "KINDS", {kind: bodies.KINDS[kind]})
    shapes = set()
    for number in range(20):
        model = bodies.vehicle(np.random.default_rng(number))
        low, high = model.mesh.bounds
        assert abs(low[2]) < 0.08 and 1.2 < high[2] < 4 and 3.4 <= high[0] - low[0] < 6.6
        assert abs(low[1] + high[1]) < 1e-6  # symmetric
        assert len(model.colours) == len(model.mesh.faces) and 0 <= model.colours.min() <= model.colours.max() <= 1
        for solid in np.split(model.mesh.triangles, _ends(model.mesh)):
            assert np.linalg.det(solid).sum() > 0  # six times the volume, which is negative inside out
        shapes.add(model.mesh.vertices.tobytes())
    assert len(shapes) == 20


def _ends(mesh):
    """Return where in the list of faces each next solid begins: it shares no vertex with earlier faces."""
    lowest, highest = mesh.faces.min(1), np.maximum.accumulate(mesh.faces.max(1))
    later = np.minimum.accumulate(lowest[::-1])[::-1]
    return np.flatnonzero(later[1:] > highest[:-1]) + 1
