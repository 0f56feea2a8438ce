"""The default data set: random toy vehicles, ray-cast into six cameras.

It replaces VeRi-776 (Liu et al., ECCV 2016) without a download, and has its folder layout, so one reader serves both.
The six cameras differ in elevation, lens, white balance, gain, blur, noise, light and road; shadows are hard. Every
random number derives from (seed, purpose, identity, camera, view) alone, so images can be rendered in any order.
"""

import itertools
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from pipeline.config import Vehicles
from pipeline.data.toy_vehicles import bodies
from pipeline.data.toy_vehicles.bodies import Colour, Floats, Model
from pipeline.files import write_text
from pipeline.progress import track

CAMERAS = 6
JPEG_QUALITY = 95
OVERSAMPLE = 2
"""Rays along each side of a pixel."""

_CAMERA, _VEHICLE, _VIEW = range(3)  # purposes of the random streams


@dataclass(frozen=True)
class Camera:
    """Settings of one camera."""

    pitch: float
    """Elevation above the vehicle, degrees."""
    field_of_view: float
    """Degrees."""
    colour: Colour
    """Gain times white balance."""
    road: Colour
    sky: Colour
    sun: Floats
    """Unit vector (3,) towards the sun."""
    line: float
    """Distance of the lane marks from the centre of the vehicle, metres."""
    blur: float
    """Standard deviation of the Gaussian blur, pixels of a 64-pixel image."""
    noise: float
    """Standard deviation of the noise, of pixels in [0, 1]."""


def cameras(seed: int) -> list[Camera]:
    """Return the six cameras of a data set."""
    rng = np.random.default_rng([seed, _CAMERA])

    def spread(low: float, high: float) -> list[float]:
        """Draw one value in each sixth of the range, shuffled, so that no seed gets six similar cameras."""
        draws = low + (high - low) * (np.arange(CAMERAS) + rng.random(CAMERAS)) / CAMERAS
        return [float(draw) for draw in rng.permutation(draws)]

    ranges = ((10, 45), (22, 40), (0.8, 1.15), (0.25, 0.6), (0, 0.7), (0.01, 0.03))
    result = []
    for pitch, field, gain, road, blur, noise in zip(*(spread(*r) for r in ranges), strict=True):
        sun = np.array([rng.normal(), rng.normal(), rng.uniform(0.8, 2)])
        result.append(
            Camera(
                pitch=pitch,
                field_of_view=field,
                colour=gain * (1 + rng.normal(0, 0.05, 3)),
                road=road * (1 + rng.normal(0, 0.05, 3)),
                sky=rng.uniform(0.55, 0.95) * rng.uniform([0.85, 0.9, 0.95], 1.05),
                sun=sun / np.linalg.norm(sun),
                line=rng.uniform(1.6, 2.4),
                blur=blur,
                noise=noise,
            )
        )
    return result


# --- images -----------------------------------------------------------------------------------------------------------


def photograph(model: Model, camera: Camera, size: int, rng: np.random.Generator) -> Image.Image:
    """Render one image (size, size) of a vehicle, from a random side, at about the camera's elevation."""
    yaw = rng.uniform(0, 2 * np.pi)
    pitch = np.radians(np.clip(camera.pitch + rng.normal(0, 4), 4, 70))
    tangent = np.tan(np.radians(camera.field_of_view) / 2)
    target = model.mesh.bounds.mean(0) + rng.normal(0, 0.12, 3)
    distance = 0.53 * np.linalg.norm(model.mesh.extents) / tangent * rng.uniform(0.9, 1.1)
    back = np.array([np.cos(yaw) * np.cos(pitch), np.sin(yaw) * np.cos(pitch), np.sin(pitch)])
    right = np.array([-np.sin(yaw), np.cos(yaw), 0.0])

    side = size * OVERSAMPLE
    steps = ((np.arange(side) + 0.5) / side * 2 - 1) * tangent
    columns, rows = steps[:, None] * right, -back - steps[:, None] * np.cross(back, right)
    directions = (rows[:, None] + columns).astype(np.float32).reshape(-1, 3)  # (R, 3), not of unit length
    samples = _trace(model, camera, (target + distance * back).astype(np.float32), directions).reshape(side, side, 3)
    phases = itertools.product(range(OVERSAMPLE), repeat=2)
    pixels = np.add.reduce([samples[row::OVERSAMPLE, column::OVERSAMPLE] for row, column in phases]) / OVERSAMPLE**2

    if rng.random() < 0.12:  # a post or a rail in front of the vehicle
        start, thick = rng.integers(0, size), rng.integers(size // 10, size // 4)
        upright = rng.random() < 0.75
        strip = np.s_[:, start : start + thick] if upright else np.s_[start : start + thick // 2]
        pixels[strip] = rng.uniform(0.1, 0.5)
    pixels = pixels * camera.colour * rng.uniform(0.92, 1.08) + rng.normal(0, camera.noise, pixels.shape)
    image = Image.fromarray((np.clip(pixels, 0, 1) * 255).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(camera.blur * size / 64))


def _trace(model: Model, camera: Camera, eye: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Return the colours (R, 3) float32 that rays from `eye` (3,) along `directions` (R, 3) hit."""
    hits = model.scene.run(np.broadcast_to(eye, directions.shape), directions, output=1)
    face, depth = hits["primID"], hits["tfar"]
    with np.errstate(divide="ignore"):
        fall = np.where(directions[:, 2] < 0, -eye[2] / directions[:, 2], np.inf)
    on_road = (face < 0) & (fall < 80)
    ground = (eye + directions[on_road] * fall[on_road, None]).astype(np.float32)
    normals = model.mesh.face_normals.astype(np.float32)
    facing = np.clip(normals @ camera.sun, 0, 1)
    sunny = np.flatnonzero((face >= 0) & (facing[face] > 0))  # the other faces point away from the sun
    points = eye + directions[sunny] * depth[sunny, None]

    # One query for all shadows. The start is lifted off the surface, which would otherwise shade itself.
    starts = np.concatenate([points + 0.01 * normals[face[sunny]], ground + np.array([0, 0, 0.01], np.float32)])
    suns = np.ascontiguousarray(np.broadcast_to(camera.sun.astype(np.float32), starts.shape))
    lit = model.scene.run(starts, suns, query="OCCLUDED") < 0

    # The palette: every face in shadow and in sun, three road colours in shadow and in sun, and the sky.
    faces = len(normals)
    checks = np.sin(ground[:, 0] * 1.3) * np.sin(ground[:, 1] * 0.9) > 0
    marks = (np.abs(np.abs(ground[:, 1]) - camera.line) < 0.08) & (np.sin(ground[:, 0] * 1.6) > -0.3)
    road = np.stack([camera.road * 0.84, camera.road, np.full(3, 0.8)])
    shades = (0.45 * model.colours, (0.45 + 0.55 * facing[:, None]) * model.colours, 0.5 * road, road)
    palette = np.concatenate([*shades, camera.sky[None]]).astype(np.float32)
    colour = np.where(face >= 0, face, len(palette) - 1)
    colour[sunny] += faces * lit[: len(sunny)]
    colour[on_road] = 2 * faces + np.where(marks, 2, checks) + 3 * lit[len(sunny) :]
    return palette[colour]


# --- the set ----------------------------------------------------------------------------------------------------------


def render(folder: Path, seed: int, vehicles: Vehicles) -> None:
    """Render the data set in the layout of VeRi-776; the same seed and sizes give the same bytes.

    Queries are, for each test identity, the first image of each camera c with c % 3 == identity % 3. Vehicles without
    labels come after all others and are in image_unlabelled, without a list: no other file depends on their number.

    Raises:
        FileExistsError: If `folder` is not empty.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; move its files away")
    for part in ("train", "query", "test"):
        (folder / f"image_{part}").mkdir(parents=True)
    if vehicles.unlabelled_identities:
        (folder / "image_unlabelled").mkdir()
    count = vehicles.train_identities + vehicles.test_identities + vehicles.unlabelled_identities
    for identity in track(range(1, count + 1), count, "rendering vehicles"):
        _render_identity(folder, seed, vehicles, identity)
    for part in ("train", "query", "test"):
        names = sorted(path.name for path in (folder / f"image_{part}").iterdir())
        write_text(folder / f"name_{part}.txt", "".join(f"{name}\n" for name in names))
    if hasattr(os, "sync"):
        os.sync()  # one flush for all images instead of one for each


def _render_identity(folder: Path, seed: int, vehicles: Vehicles, identity: int) -> None:
    model = bodies.vehicle(np.random.default_rng([seed, _VEHICLE, identity]))
    for (number, camera), view in itertools.product(enumerate(cameras(seed), start=1), range(vehicles.views)):
        part = "train" if identity <= vehicles.train_identities else "test"
        if identity > vehicles.train_identities + vehicles.test_identities:
            part = "unlabelled"
        elif part == "test" and view == 0 and number % 3 == identity % 3:
            part = "query"
        image = photograph(model, camera, vehicles.size, np.random.default_rng([seed, _VIEW, identity, number, view]))
        path = folder / f"image_{part}" / f"{identity:04d}_c{number:03d}_{view:08d}_0.jpg"
        image.save(path, quality=JPEG_QUALITY, subsampling=0)
