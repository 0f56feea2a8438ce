"""Stage `prepare`: from raw images to a manifest that later stages can trust.

Reads   data.root (source `vehicles` renders its own images)
Writes  artifacts/prepare/, artifacts/warnings.csv, metrics/prepare.json
"""

import logging
import shutil
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from pipeline.data.images import build_cache, data_root
from pipeline.data.inspection import changed, deduplicate, inspect, leaks, near_duplicates, refuse, twins
from pipeline.data.layout import UNKNOWN
from pipeline.data.manifest import DataError, Manifest, some
from pipeline.data.sources import read_source
from pipeline.data.splits import check_test_set, split_test, split_validation
from pipeline.files import csv_text, write_text
from pipeline.records import PrepareRecord
from pipeline.stage.run import Run, run_stage

log = logging.getLogger(__name__)


def prepare(run: Run) -> PrepareRecord:
    """Render, read, inspect, split, cache."""
    data, files, seed = run.params.data, run.files, run.params.seed
    root = data_root(files, run.params)
    if data.source == "vehicles":
        from pipeline.data.toy_vehicles import render  # needs two libraries that nothing else needs

        started = time.monotonic()
        shutil.rmtree(root, ignore_errors=True)  # DVC does so before it runs a stage; by hand, an earlier set is there
        render.render(root, seed, data.vehicles)
        run.timing("render", time.monotonic() - started)
    source = read_source(data, root)
    found = inspect(source.items, root)
    found = deduplicate(replace(found, good=split_test(found.good, data.custom.test, seed, data.protocol)))
    copies = leaks(found)
    alike = near_duplicates(found, data.near_duplicate_bits)
    asked_twice = [] if data.protocol.startswith("market") else twins(found)  # which leaves copies out
    warnings = [
        *source.warnings,
        *found.warnings,
        *((test, f"has the pixels of training image {train}") for train, test in copies),
        *((other, f"has the pixels of {one}, a test image too") for one, other in asked_twice),
        *((test, f"looks like training image {train} ({bits} of 64 bits differ)") for train, test, bits in alike),
    ]
    _list(files.quarantine, "reason", found.quarantined)
    _list(files.warnings, "warning", warnings)
    if warnings:
        log.warning(
            "%d warnings about images, such as %s; all are in warnings.csv", len(warnings), ": ".join(warnings[0])
        )
    refuse(found, len(source.items), data.max_quarantined, data.max_leaked)
    check_test_set(found.good, data.protocol)
    manifest = Manifest(split_validation(found.good, data.validation, seed, data.protocol), root)
    if data.cache:
        height, width = data.image_size
        build_cache(manifest, (height, width), files.image_cache)
    if touched := changed(found, root):
        raise DataError(f"{len(touched)} images changed while they were read: {some(touched)}; run the stage again")
    manifest.write(files.manifest)
    return PrepareRecord(
        images=len(manifest),
        identities=len({item.identity for item in manifest.items}),
        cameras=len({item.camera for item in manifest.items} - {UNKNOWN}),
        train=len(manifest.indices("train")),
        validation=len(manifest.indices("validation-query", "validation-gallery")),
        query=len(manifest.indices("query")),
        gallery=len(manifest.indices("gallery")),
        quarantined=len(found.quarantined),
        leaked=len(copies),
        near_duplicates=len(alike),
    )


def _list(path: Path, heading: str, rows: Iterable[tuple[str, str]]) -> None:
    """Write (path, what is said about it)."""
    write_text(path, csv_text(("path", heading), rows))


if __name__ == "__main__":
    run_stage(prepare)
