"""Stage `prepare`: from raw images to a manifest that later stages can trust.

Reads   data.root (source `vehicles` renders its own images)
Writes  artifacts/prepare/, metrics/prepare.json
"""

import csv
import io
import time

from pipeline.data import vehicles
from pipeline.data.images import build_cache, data_root
from pipeline.data.inspect import Inspection, inspect, leaks, split_validation
from pipeline.data.manifest import DataError, Manifest, some
from pipeline.data.sources import read_source
from pipeline.files import write_text
from pipeline.ops.stage import Run, run_stage
from pipeline.records import PrepareRecord


def prepare(run: Run) -> PrepareRecord:
    """Render, read, inspect, split, cache."""
    data, files = run.params.data, run.files
    root = data_root(files, run.params)
    if data.source == "vehicles":
        started = time.monotonic()
        vehicles.render(root, run.params.seed, data.vehicles)
        run.timing("render", time.monotonic() - started)
    items = read_source(data.source, root)
    found = inspect(items, root)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("path", "reason"), *found.quarantined])
    write_text(files.quarantine, text.getvalue())
    _refuse(found, len(items), data.max_quarantined)
    manifest = Manifest(split_validation(found.good, data.validation, run.params.seed), root)
    manifest.write(files.manifest)
    if data.cache:
        height, width = data.image_size
        build_cache(manifest, (height, width), files.image_cache)
    return PrepareRecord(
        images=len(manifest),
        identities=len({item.identity for item in manifest.items}),
        cameras=len({item.camera for item in manifest.items}),
        train=len(manifest.rows("train")),
        validation=len(manifest.rows("validation-query", "validation-gallery")),
        query=len(manifest.rows("query")),
        gallery=len(manifest.rows("gallery")),
        quarantined=len(found.quarantined),
        leaked=0,  # else there is no manifest
    )


def _refuse(found: Inspection, images: int, max_quarantined: float) -> None:
    """Stop where too much is unreadable, or where the test set would be known from training."""
    bad = [f"{path} ({reason})" for path, reason in found.quarantined]
    if len(bad) > max_quarantined * images:
        raise DataError(
            f"{len(bad)} of {images} images are unreadable, more than `data.max_quarantined` ({max_quarantined}): "
            f"{some(bad)}; all are in quarantine.csv: replace them or raise the limit"
        )
    if pairs := [f"{test} = {train}" for train, test in leaks(found)]:
        raise DataError(
            f"{len(pairs)} test images are training images too: {some(pairs)}; remove them from one of the two"
        )


if __name__ == "__main__":
    run_stage(prepare)
