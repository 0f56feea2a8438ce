"""A latency model of this machine: the time of each layer as a function of its widths, for latency budgets.

ONNX Runtime runs networks of the same depth with random widths, and its profiler measures every layer inside of the
network (alone, a layer would see other cache contents and another memory layout). The time of a layer is fitted as
`product * in * out + per_left * in + per_right * out + constant`.
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
from pipeline.inference.timing_graph import HEAD, timing_graph
from pipeline.models.cost import CostModel, Term, fixed_sizes
from pipeline.models.spec import LAST, ArchSpec
from pipeline.progress import track

log = logging.getLogger(__name__)

NETWORKS, ROUNDS, CALLS, WARM_UP = 24, 4, 10, 4
"""Number of sampled networks, of rounds over all of them, and of timed and untimed calls of each in a round."""

LayerTimes = dict[str, float]
"""Seconds by layer name."""


def latency_model(spec: ArchSpec, image_size: tuple[int, int], multiple: int) -> CostModel:
    """Measure the latency of one image with all threads, seconds, as a function of widths.

    This takes some seconds for small networks, and a minute for large ones.
    """
    specs = list(_sample_specs(spec, multiple))
    files = [timing_graph(sample, image_size) for sample in specs]
    pixels = np.random.default_rng(0).standard_normal((1, 3, *image_size), dtype=np.float32)
    layers: list[list[LayerTimes]] = [[] for _ in specs]
    totals: list[list[float]] = [[] for _ in specs]
    for _ in track(range(ROUNDS), ROUNDS, "timing layers"):
        for number, file in enumerate(files):
            layers[number].append(_layer_times(file, pixels))
            totals[number].append(_total_time(file, pixels))
    fastest = [{name: min(run[name] for run in runs) for name in runs[0]} for runs in layers]
    sizes = [{**fixed_sizes(spec), **sample.widths} for sample in specs]
    terms = [_fit(spec, name, sizes, [run[name] for run in fastest]) for name in fastest[0]]
    # The layers do not sum up to the whole: time passes between nodes, and profiling slows each of them down (`rest`
    # may be negative). So the layers determine the differences, and the unprofiled times determine the scale.
    measured = np.array([min(runs) for runs in totals])
    layer_sums = np.array([[sum(term(size) for term in terms), 1.0] for size in sizes])
    factor, rest = np.linalg.lstsq(layer_sums / measured[:, None], np.ones(len(measured)))[0]
    share = rest / len(terms)
    scaled = tuple(replace(term.scaled(factor), constant=factor * term.constant + share) for term in terms)
    model = CostModel(scaled, fixed_sizes(spec))
    errors = [abs(model(sample.widths) / seconds - 1) for sample, seconds in zip(specs, measured, strict=True)]
    log.info("layers timed: the latency of a network is predicted with an error of %.1f %% (median), %.1f %% (largest)",
             100 * float(np.median(errors)), 100 * max(errors))  # fmt: skip
    return model


def stored_latency_model(path: Path, spec: ArchSpec, image_size: tuple[int, int], multiple: int) -> CostModel:
    """Read a latency model from a JSON file, or measure and write it if the file is missing.

    A resumed training must use the same model as before the interruption.
    """
    if not path.is_file():
        model = latency_model(spec, image_size, multiple)
        write_model(path, model)
    return CostModel(tuple(Term(**term) for term in read_json(path)), fixed_sizes(spec))


def write_model(path: Path, model: CostModel) -> None:
    """Write the terms of a latency model as JSON."""
    write_text(path, json.dumps([asdict(term) for term in model.terms], indent=1) + "\n")


def stored_latency_ratio(path: Path, spec: ArchSpec, image_size: tuple[int, int], widths: Mapping[str, int]) -> float:
    """Return the latency with other widths as a fraction of that of `spec`.

    The ratio is read from a JSON file; if it is missing there, both networks are timed side by side and it is added.
    """
    ratios = read_json(path) if path.is_file() else {}
    key = json.dumps(dict(widths), sort_keys=True)
    if key not in ratios:
        full = spec.model_copy(update={"indicators": (), "identities": 0})
        narrow = full.narrowed(widths)
        files = {"full": timing_graph(full, image_size), "narrow": timing_graph(narrow, image_size)}
        ratios[key] = 1 / gains(files, "full", image_size)["narrow"].ratio
        write_text(path, json.dumps(ratios, indent=1) + "\n")
    return float(ratios[key])


def _sample_specs(spec: ArchSpec, multiple: int) -> Iterator[ArchSpec]:
    """Yield specs from the full one to a very narrow one, with a random width at each site."""
    random = np.random.default_rng(0)
    for share in np.geomspace(1.0, 0.06, NETWORKS):
        widths = {}
        for site, full in spec.widths.items():
            factor = min(1.0, share * random.uniform(0.5, 2.0)) if share < 1 else 1.0
            widths[site] = min(full, max(1, round(factor * full / multiple)) * multiple)
        if not spec.has_linear:
            widths[LAST] = spec.embedding_dim
        yield spec.narrowed(widths).model_copy(update={"indicators": (), "identities": 0})


def _layer_times(file: bytes, pixels: npt.NDArray[np.float32]) -> LayerTimes:
    """Return the median time of each layer by ONNX Runtime's profiler."""
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(file, profile=Path(folder) / "profile")
        for _ in range(WARM_UP + CALLS):
            session.run(None, {INPUT: pixels})
        events = json.loads(Path(session.end_profiling()).read_text())
    nodes = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    calls: dict[tuple[str, str], list[float]] = defaultdict(list)
    unnamed: list[dict[str, Any]] = []
    for event in sorted(nodes, key=lambda event: event["ts"]):
        if "/" not in event["name"]:  # a change of memory layout, which counts to the layer of the next node
            unnamed.append(event)
            continue
        layer = event["name"].partition("/")[0].removeprefix("fused ")  # a linear map with the ReLU behind it
        for part in (*unnamed, event):
            calls[layer, part["name"]].append(part["dur"] / 1e6)
        unnamed.clear()
    times: LayerTimes = defaultdict(float)
    for (layer, _), seconds in calls.items():
        times[layer] += float(np.median(seconds[WARM_UP:]))
    return dict(times)


def _total_time(file: bytes, pixels: npt.NDArray[np.float32]) -> float:
    """Return the median time of a call without the profiler, seconds."""
    session, seconds = open_session(file), []
    for _ in range(WARM_UP + CALLS):
        start = perf_counter()
        session.run(None, {INPUT: pixels})
        seconds.append(perf_counter() - start)
    return float(np.median(seconds[WARM_UP:]))


def _fit(spec: ArchSpec, name: str, sizes: Sequence[Mapping[str, int]], seconds: Sequence[float]) -> Term:
    """Fit the time of a layer as a function of its widths, by non-negative least squares of the relative errors."""
    layer = next((layer for layer in spec.layers() if layer.name == name), HEAD)
    measured = np.array(seconds)
    left, right = (np.array([size[side] for size in sizes], dtype=float) for side in (layer.source, layer.target))
    features = np.stack([left * right, left, right, np.ones_like(left)], axis=1)
    scale = features.max(axis=0)
    coefficients, _ = nnls(features / scale / measured[:, None], np.ones_like(measured))
    return Term(layer.source, layer.target, *(float(value) for value in coefficients / scale))
