"""Results of a small run, as input of the report."""

from types import SimpleNamespace

import numpy as np

from pipeline.inference.footprint import Footprint
from pipeline.inference.timing import Timing
from pipeline.records import ExportRecord, PrepareRecord, StudentRecord, SurgeryRecord, TeacherRecord
from pipeline.report.build import RunResults
from pipeline.report.latency import benchmark_record

IDENTITIES, CAMERAS = 6, 3
LABELS = [(f"{identity:03d}", f"c{camera}") for identity in range(IDENTITIES) for camera in range(CAMERAS)]
SPLITS = ["query" if camera == "c0" else "gallery" for _, camera in LABELS]
WIDTHS = {"layer1.0.conv1": 32, "layer1.0.conv2": 32}


class Manifest:
    """Six identities and three cameras; images of the first camera are the queries. Labels end with `suffix`."""

    def __init__(self, suffix=""):
        self.suffix = suffix

    items = tuple(SimpleNamespace(path=f"{identity}_{camera}.jpg") for identity, camera in LABELS)

    def indices(self, *splits):
        return np.array([index for index, split in enumerate(SPLITS) if split in splits])

    def identities(self, indices):
        return np.array([LABELS[index][0] + self.suffix for index in indices])

    def cameras(self, indices):
        return np.array([LABELS[index][1] + self.suffix for index in indices])


class Pictures:
    """One image of uniform grey per index."""

    def batch(self, indices):
        return np.broadcast_to(np.uint8(10 * indices)[:, None, None, None], (len(indices), 8, 6, 3))


def embeddings(noise):
    """Return embeddings of queries, then gallery; without noise every query ranks its identity first."""
    indices = np.concatenate([Manifest().indices("query"), Manifest().indices("gallery")])
    identity = np.eye(IDENTITIES)[indices // CAMERAS]
    vectors = identity + noise * np.random.default_rng(0).normal(size=identity.shape)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def timed(file, *turns):
    return Timing(file, 1, 0, turns[0], 1.25 * turns[0], 1.5 * turns[0], 0.2, turns)


def results(**changes):
    scores = {"rank1": 0.79, "rank5": 0.9, "rank10": 0.95, "minp": 0.3, "queries": 6, "dropped": 0}
    reductions = {"params_reduction": 0.625, "macs_reduction": 0.75}
    small = {"map": 0.6721, "params": 1_500_000, "macs": 20_000_000, **reductions}
    teacher = TeacherRecord(map=0.668, params=4_000_000, macs=80_000_000, **scores)
    timings = [timed("teacher", *[4.0] * 8), timed("student", *[2.0] * 8)]
    footprints = {"teacher": Footprint(16 * 2**20, 80 * 2**20, ()), "student": Footprint(6 * 2**20, None, ("conv1",))}
    epochs = {"epoch": np.array([1.0, 2.0]), "validation_map": np.array([np.nan, 0.5]), "loss": np.array([2.0, 1.0])}
    curves = {f"{what}_reduction": np.array([0.0, 0.75]) for what in ("macs", "params", "target")}
    values = {
        "data": "vehicles, 8 x 6 pixels",
        "machine": "a machine of four threads",
        "seed": 3,
        "protocol": "market",
        "prepare": PrepareRecord(
            images=18,
            identities=6,
            cameras=3,
            train=0,
            validation=0,
            query=6,
            gallery=12,
            quarantined=0,
            leaked=0,
            near_duplicates=0,
        ),
        "teacher": teacher,
        "student": StudentRecord(target=0.75, **small, **scores),
        "surgery": SurgeryRecord(max_abs_diff=0.0, widths={}, **small, **scores),
        "export": ExportRecord(
            map_allinone=0.679,
            map_teacher=0.668,
            min_cosine=1.0,
            bytes=6,
            bytes_allinone=7,
            bytes_teacher=16,
            int8_published=0,
            **small,
            **{f"{name}_to_teacher": value for name, value in reductions.items()},
        ),
        "benchmark": benchmark_record(timings, footprints, teacher.macs, small["macs"]),
        "timings": timings,
        "footprints": footprints,
        "curves": {"teacher": epochs, "student": epochs | curves},
        "widths": {"uncompressed": WIDTHS, "student": dict.fromkeys(WIDTHS, 8)},
        "sites": tuple(WIDTHS),
        "embeddings": {"teacher": embeddings(0.0), "student": embeddings(2.0)},
        "manifest": Manifest(),
        "images": Pictures(),
        "panels": 2,
    }
    return RunResults(**values | changes)
