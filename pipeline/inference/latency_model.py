"""How long each layer takes on this machine, at any widths: what a latency budget counts.

Some networks of the same depth and random widths are run by ONNX Runtime, whose profile tells the time of every layer
in its place: alone, a layer would find other caches and another layout. A layer's time is then
`product * in * out + per_in * in + per_out * out + constant`, fitted to what was measured.
"""

import json
import logging
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from pipeline.files import read_json, write_text
from pipeline.inference.session import INPUT, open_session
from pipeline.inference.timing import gains
from pipeline.inference.timing_graph import timing_graph
from pipeline.models.cost import CostModel, Term, fixed_sizes
from pipeline.models.spec import ArchSpec
from pipeline.progress import track

log = logging.getLogger(__name__)

NETWORKS, ROUNDS, CALLS, WARM_UP = 24, 4, 10, 4
"""Networks that are timed, in rounds, by so many calls after some that do not count."""

Seconds = dict[str, float]
"""By layer."""


def latency_model(spec: ArchSpec, image_size: tuple[int, int], multiple: int) -> CostModel:
    """Seconds for one image with all threads, as a function of widths.

    It takes some seconds for small networks, and a minute for large ones.
    """
    specs = list(_samples(spec, multiple))
    files = [timing_graph(sample, image_size) for sample in specs]
    pixels = np.random.default_rng(0).standard_normal((1, 3, *image_size), dtype=np.float32)
    layers: list[list[Seconds]] = [[] for _ in specs]
    totals: list[list[float]] = [[] for _ in specs]
    for _ in track(range(ROUNDS), ROUNDS, "timing layers"):
        for number, file in enumerate(files):
            layers[number].append(_profile(file, pixels))
            totals[number].append(_total(file, pixels))
    fastest = [{name: min(run[name] for run in runs) for name in runs[0]} for runs in layers]
    sizes = [{**fixed_sizes(spec), **sample.widths} for sample in specs]
    terms = [_fit(spec, name, sizes, [run[name] for run in fastest]) for name in fastest[0]]
    # Between the nodes some time passes that none is charged with, and profiling costs each of them some: `rest` may be
    # negative. Of single layers only differences matter, and of their sum the whole.
    whole = np.array([min(runs) for runs in totals])
    inside = np.array([[sum(term(size) for term in terms), 1.0] for size in sizes])
    factor, rest = np.linalg.lstsq(inside / whole[:, None], np.ones(len(whole)))[0]
    share = rest / len(terms)
    scaled = tuple(replace(term.scaled(factor), constant=factor * term.constant + share) for term in terms)
    model = CostModel(scaled, fixed_sizes(spec))
    errors = [abs(model(sample.widths) / took - 1) for sample, took in zip(specs, whole, strict=True)]
    log.info("layers timed: a network's time is told to %.1f %% (median), %.1f %% (worst)",
             100 * float(np.median(errors)), 100 * max(errors))  # fmt: skip
    return model


def kept_latency_model(path: Path, spec: ArchSpec, image_size: tuple[int, int], multiple: int) -> CostModel:
    """`latency_model`, read from a file where there is one: a training that goes on must count as it began.

    Args:
        path: JSON file, written where it is missing.
        spec: The uncompressed network.
        image_size: Height and width, pixels.
        multiple: Of the widths that are tried.
    """
    if not path.is_file():
        model = latency_model(spec, image_size, multiple)
        write_model(path, model)
    return CostModel(tuple(Term(**term) for term in read_json(path)), fixed_sizes(spec))


def write_model(path: Path, model: CostModel) -> None:
    """Write the terms as JSON."""
    write_text(path, json.dumps([asdict(term) for term in model.terms], indent=1) + "\n")


def kept_share(path: Path, spec: ArchSpec, image_size: tuple[int, int], widths: Mapping[str, int]) -> float:
    """Share of a network's time that it takes with other widths: both are run in turns, once.

    Args:
        path: JSON file of what was measured before.
        spec: The uncompressed network.
        image_size: Height and width, pixels.
        widths: Of the narrowed one.
    """
    known = read_json(path) if path.is_file() else {}
    asked = json.dumps(dict(widths), sort_keys=True)
    if asked not in known:
        full = spec.model_copy(update={"indicators": (), "identities": 0})
        narrow = full.model_copy(update={"widths": {**spec.widths, **widths}})
        files = {"full": timing_graph(full, image_size), "narrow": timing_graph(narrow, image_size)}
        known[asked] = 1 / gains(files, "full", image_size)["narrow"].ratio
        write_text(path, json.dumps(known, indent=1) + "\n")
    return float(known[asked])


def _samples(spec: ArchSpec, multiple: int) -> Iterator[ArchSpec]:
    """Specs from the full one to a very narrow one, each site with a share of its own."""
    random = np.random.default_rng(0)
    for share in np.geomspace(1.0, 0.06, NETWORKS):
        widths = {}
        for site, full in spec.widths.items():
            factor = min(1.0, share * random.uniform(0.5, 2.0)) if share < 1 else 1.0
            widths[site] = min(full, max(1, round(factor * full / multiple)) * multiple)
        yield spec.model_copy(update={"widths": widths, "indicators": (), "identities": 0})


def _profile(file: bytes, pixels: npt.NDArray[np.float32]) -> Seconds:
    """Time of each layer by the profile."""
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(file, profile=Path(folder) / "profile")
        for _ in range(WARM_UP + CALLS):
            session.run(None, {INPUT: pixels})
        events = json.loads(Path(session.end_profiling()).read_text())
    nodes = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    calls: dict[tuple[str, str], list[float]] = defaultdict(list)
    unnamed: list[dict[str, Any]] = []
    for event in sorted(nodes, key=lambda event: event["ts"]):
        if "/" not in event["name"]:  # a change of layout, which the next node needs
            unnamed.append(event)
            continue
        layer = event["name"].partition("/")[0]
        for part in (*unnamed, event):
            calls[layer, part["name"]].append(part["dur"] / 1e6)
        unnamed.clear()
    found: Seconds = defaultdict(float)
    for (layer, _), seconds in calls.items():
        found[layer] += float(np.median(seconds[WARM_UP:]))
    return dict(found)


def _total(file: bytes, pixels: npt.NDArray[np.float32]) -> float:
    """Median time of a call, seconds, without a profile."""
    session, seconds = open_session(file), []
    for _ in range(WARM_UP + CALLS):
        start = perf_counter()
        session.run(None, {INPUT: pixels})
        seconds.append(perf_counter() - start)
    return float(np.median(seconds[WARM_UP:]))


def _fit(spec: ArchSpec, name: str, sizes: Sequence[Mapping[str, int]], seconds: Sequence[float]) -> Term:
    """A layer's time as a function of its widths, no part of it negative, relative errors smallest."""
    layer = next(layer for layer in spec.layers() if layer.name == name)
    took = np.array(seconds)
    left, right = (np.array([size[side] for size in sizes], dtype=float) for side in (layer.source, layer.target))
    features = np.stack([left * right, left, right, np.ones_like(left)], axis=1)
    scale = features.max(axis=0)
    coefficients, _ = nnls(features / scale / took[:, None], np.ones_like(took))
    return Term(layer.source, layer.target, *(float(value) for value in coefficients / scale))
