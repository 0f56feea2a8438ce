"""Random 3D models of toy vehicles: five body types with random proportions, paint and extras.

Coordinates: x forward, y left, z up, metres; the vehicle stands on z = 0. Colours are RGB in [0, 1].
"""

import colorsys
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import trimesh
from embreex.mesh_construction import TriangleMesh
from embreex.rtcore_scene import EmbreeScene

Floats = npt.NDArray[np.floating]
Colour = Floats
"""RGB (3,) in [0, 1]."""
Span = tuple[float, float]
"""(from, to), metres."""

_GLASS, _TYRE, _TRIM = (np.array(rgb) for rgb in ((0.12, 0.16, 0.20), (0.05, 0.05, 0.05), (0.10, 0.10, 0.11)))
_LAMP, _TAIL_LAMP, _PLATE = (np.array(rgb) for rgb in ((0.95, 0.93, 0.80), (0.65, 0.05, 0.05), (0.80, 0.80, 0.78)))
_BOX = trimesh.creation.box((1, 1, 1))
_BOX_CORNERS = _BOX.vertices > 0  # (8, 3)
_WHEEL = trimesh.creation.cylinder(radius=1, height=1, sections=16)


class Model:
    """A coloured mesh for ray casting.

    Attributes:
        mesh: F triangles.
        colours: (F, 3) RGB in [0, 1].
        scene: The mesh in Embree.
    """

    def __init__(self, mesh: trimesh.Trimesh, colours: Floats) -> None:
        self.mesh, self.colours = mesh, colours
        self.scene = EmbreeScene()
        # trimesh's own intersector returns no distances and lacks the cheaper occlusion query for shadows.
        TriangleMesh(self.scene, mesh.vertices.astype(np.float32), mesh.faces.astype(np.int32))


class _Builder:
    """Collects coloured solids into one mesh."""

    def __init__(self) -> None:
        self._solids: list[tuple[Floats, npt.NDArray[np.int64], Colour]] = []

    def block(
        self,
        x: Span,
        z: Span,
        width: float,
        colour: Colour,
        *,
        top_x: Span | None = None,
        top_width: float | None = None,
        y: float = 0.0,
    ) -> None:
        """Add a box of `width` centred at `y`, which may narrow towards its top."""
        top_x, top_width = top_x or x, top_width or width
        front, left, top = _BOX_CORNERS.T
        lengths = np.where(top, np.where(front, top_x[1], top_x[0]), np.where(front, x[1], x[0]))
        widths = np.where(left, 0.5, -0.5) * np.where(top, top_width, width) + y
        self._solids.append((np.stack([lengths, widths, np.where(top, z[1], z[0])], 1), _BOX.faces, colour))

    def cabin(
        self, x: Span, z: Span, width: float, layers: list[tuple[float, Colour]], insets: Span, taper: float
    ) -> None:
        """Add a block of coloured layers.

        Args:
            layers: (top as a share of the block's height, colour) of each layer, from the bottom.
            insets: By how many metres the top is shorter than the bottom, at the rear and at the front.
            taper: Share of the width by which the top is narrower.
        """

        def at(share: float) -> tuple[Span, float, float]:
            ends = (x[0] + share * insets[0], x[1] - share * insets[1])
            return ends, width * (1 - taper * share), z[0] + share * (z[1] - z[0])

        for low, (high, colour) in zip([0.0, *(share for share, _ in layers)], layers, strict=False):
            (ends, wide, bottom), (top_ends, top_wide, top) = at(low), at(high)
            self.block(ends, (bottom, top), wide, colour, top_x=top_ends, top_width=top_wide)

    def disc(self, x: float, y: float, z: float, radius: float, thick: float, colour: Colour) -> None:
        """Add a cylinder about the y axis."""
        vertices = (_WHEEL.vertices * (radius, radius, thick))[:, [0, 2, 1]] + (x, y, z)
        self._solids.append((vertices, _WHEEL.faces[:, ::-1], colour))  # swapping axes reflects the faces

    def height(self) -> float:
        """Return the height of all solids so far, metres."""
        return max(float(vertices[:, 2].max()) for vertices, _, _ in self._solids)

    def model(self) -> Model:
        """Return all solids as one mesh."""
        starts = np.cumsum([0, *(len(vertices) for vertices, _, _ in self._solids)])
        vertices = np.concatenate([vertices for vertices, _, _ in self._solids])
        faces = np.concatenate([faces + start for (_, faces, _), start in zip(self._solids, starts, strict=False)])
        colours = np.concatenate([np.tile(colour, (len(faces), 1)) for _, faces, colour in self._solids])
        return Model(trimesh.Trimesh(vertices, faces, process=False), colours)


@dataclass(frozen=True)
class _Plan:
    """Dimensions (metres) and paint that all body types use."""

    long: float
    wide: float
    deck: float
    """Height of the top of the lower body."""
    cabin: float
    """Height of a saloon's cabin above the deck."""
    body: Colour
    second: Colour

    @property
    def rear(self) -> float:
        return -self.long / 2

    @property
    def front(self) -> float:
        return self.long / 2


def _saloon(build: _Builder, plan: _Plan, rng: np.random.Generator) -> float:
    length, middle = plan.long * rng.uniform(0.42, 0.65), plan.long * rng.uniform(-0.12, 0.02)
    x, z = (middle - length / 2, middle + length / 2), (plan.deck, plan.deck + plan.cabin)
    layers = [(0.85, _GLASS), (1.0, plan.second)]
    build.cabin(x, z, plan.wide * 0.95, layers, (length * 0.16, length * 0.24), 0.16)
    post = (middle - 0.05, middle + 0.05)
    build.block(post, (z[0], z[0] + 0.9 * plan.cabin), plan.wide * 0.955, plan.body, top_width=plan.wide * 0.825)
    return middle


def _estate(build: _Builder, plan: _Plan, rng: np.random.Generator) -> float:
    length = plan.long * rng.uniform(0.68, 0.8)
    x, z = (plan.rear + 0.04, plan.rear + 0.04 + length), (plan.deck, plan.deck + plan.cabin * 1.3)
    layers = [(0.2, plan.second), (0.72, _GLASS), (1.0, plan.second)]
    build.cabin(x, z, plan.wide * 0.96, layers, (length * 0.04, length * 0.2), 0.14)
    for share in (0.06, 0.36, 0.62):
        post = (x[0] + share * length, x[0] + share * length + 0.12)
        build.block(post, z, plan.wide * 0.965, plan.second, top_width=plan.wide * 0.83)
    return x[0] + length / 2


def _pickup(build: _Builder, plan: _Plan, rng: np.random.Generator) -> float:
    length, wall = plan.long * rng.uniform(0.28, 0.42), plan.deck + rng.uniform(0.15, 0.4)
    x, z = (plan.long * 0.26 - length, plan.long * 0.26), (plan.deck, plan.deck + plan.cabin)
    layers = [(0.82, _GLASS), (1.0, plan.body)]
    build.cabin(x, z, plan.wide * 0.95, layers, (length * 0.08, length * 0.28), 0.14)
    bed = (plan.rear, x[0] - 0.05)
    for side in (-0.47, 0.47):
        build.block(bed, (plan.deck, wall), plan.wide * 0.06, plan.second, y=side * plan.wide)
    build.block((plan.rear, plan.rear + 0.08), (plan.deck, wall), plan.wide, plan.second)
    build.block(bed, (plan.deck, plan.deck + 0.02), plan.wide * 0.88, _TRIM)
    return x[0] + length / 2


def _lorry(build: _Builder, plan: _Plan, rng: np.random.Generator) -> float:
    load = (plan.rear, plan.rear + plan.long * rng.uniform(0.58, 0.7))
    build.block(load, (plan.deck, plan.deck + rng.uniform(1.0, 1.9)), plan.wide * 1.02, plan.second)
    x, z = (load[1] + 0.08, plan.front - 0.05), (plan.deck, plan.deck + plan.cabin * 1.2)
    layers = [(0.15, plan.body), (0.8, _GLASS), (1.0, plan.body)]
    build.cabin(x, z, plan.wide * 0.95, layers, (0.0, (x[1] - x[0]) * 0.35), 0.08)
    return sum(load) / 2


def _bus(build: _Builder, plan: _Plan, rng: np.random.Generator) -> float:
    z = (plan.deck, plan.deck + rng.uniform(1.0, 1.5))
    layers = [(0.35, plan.second), (0.78, _GLASS), (1.0, plan.second)]
    build.cabin((plan.rear + 0.04, plan.front - 0.08), z, plan.wide * 0.97, layers, (0.05, 0.15), 0.04)
    for post in np.linspace(plan.rear + 0.3, plan.front - 0.9, rng.integers(4, 7)):
        top = z[0] + 0.9 * (z[1] - z[0])
        build.block((post, post + 0.1), (z[0], top), plan.wide * 0.975, plan.second, top_width=plan.wide * 0.945)
    return 0.0


KINDS: dict[str, Callable[[_Builder, _Plan, np.random.Generator], float]] = {
    "saloon": _saloon,
    "estate": _estate,
    "pickup": _pickup,
    "lorry": _lorry,
    "bus": _bus,
}
"""Builders of what stands on the lower body; each returns x of the middle of its roof, metres."""


def vehicle(rng: np.random.Generator) -> Model:
    """Return a random vehicle."""
    build = _Builder()
    kind = rng.choice(list(KINDS))
    wide, high, gap, cabin, long = rng.uniform([1.6, 0.55, 0.25, 0.5, 3.4], [2.1, 0.9, 0.5, 0.75, 6.2]).tolist()
    body = _paint(rng)
    second = body if rng.random() < 0.5 else _paint(rng)
    plan = _Plan(long, wide, gap + high, cabin, body, second)
    ends, top = (plan.rear, plan.front), (plan.rear + 0.04, plan.front - 0.08)
    build.block(ends, (gap, plan.deck), wide, body, top_x=top, top_width=wide * 0.97)
    build.block((plan.rear - 0.05, plan.front + 0.05), (gap, gap + 0.14), wide * 0.98, _TRIM)  # bumpers
    roof = KINDS[kind](build, plan, rng)
    long_axles = kind in ("lorry", "bus") and rng.random() < 0.5
    _fittings(build, plan, (0.34, -0.2, -0.36) if long_axles else (0.32, -0.32), gap, rng)
    _extras(build, plan, roof, kind in ("saloon", "pickup"), gap, rng)
    return build.model()


def _paint(rng: np.random.Generator) -> Colour:
    if rng.random() < 0.7:
        return np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.2, 1), rng.uniform(0.25, 1)))
    return np.repeat(rng.uniform(0.08, 0.95), 3)


def _fittings(build: _Builder, plan: _Plan, axles: tuple[float, ...], gap: float, rng: np.random.Generator) -> None:
    """Add what every vehicle has: wheels, lamps and blank number plates."""
    radius, hub = rng.uniform(0.28, 0.42), np.repeat(rng.uniform(0.15, 0.75), 3)
    for x, y in itertools.product(axles, (-0.5, 0.5)):
        build.disc(x * plan.long, y * plan.wide, radius, radius * 1.16, 0.06, _TRIM)  # wheel arch
        build.disc(x * plan.long, y * plan.wide, radius, radius, 0.22, _TYRE)
        build.disc(x * plan.long, y * plan.wide, radius, radius * 0.55, 0.25, hub)
    z = (plan.deck - 0.3, plan.deck - 0.1)
    for side in (-0.36, 0.36):
        build.block((plan.front - 0.1, plan.front + 0.02), z, plan.wide * 0.18, _LAMP, y=side * plan.wide)
        build.block((plan.rear - 0.02, plan.rear + 0.1), z, plan.wide * 0.16, _TAIL_LAMP, y=side * plan.wide)
    build.block((plan.rear - 0.07, plan.front + 0.07), (gap + 0.16, gap + 0.28), 0.45, _PLATE)


def _extras(build: _Builder, plan: _Plan, roof: float, low: bool, gap: float, rng: np.random.Generator) -> None:
    """Add random extras; `low` body types have the spoiler behind the cabin, the others on the roof."""
    wide, rear, front, top = plan.wide, plan.rear, plan.front, build.height()
    if rng.random() < 0.35:  # roof box
        middle, half = roof + rng.uniform(-0.2, 0.2), rng.uniform(0.25, 0.7)
        build.block((middle - half, middle + half), (top, top + 0.25), wide * 0.5, _paint(rng), top_width=wide * 0.42)
    if rng.random() < 0.3:  # spoiler
        wing, foot = (plan.deck + 0.42, plan.deck) if low else (top + 0.1, top - 0.05)
        build.block((rear - 0.08, rear + 0.25), (wing, wing + 0.07), wide * 0.9, plan.body)
        for side in (-0.3, 0.3):
            build.block((rear + 0.06, rear + 0.14), (foot, wing), 0.06, _TRIM, y=side * wide)
    if rng.random() < 0.4:  # stripe
        high = plan.deck - gap
        bottom = gap + high * rng.uniform(0.15, 0.6)
        z = (bottom, bottom + high * rng.uniform(0.15, 0.35))
        build.block((rear - 0.03, front + 0.03), z, wide * 1.01, _paint(rng))
    if rng.random() < 0.3:  # mark on the bonnet
        z = (plan.deck, plan.deck + 0.03)
        build.block((front - plan.long * 0.3, front - 0.1), z, wide * rng.uniform(0.15, 0.4), _paint(rng))
