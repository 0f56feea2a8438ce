"""Stage `prepare`: check and split the raw images, and write the manifest.

Reads   data.root (source `vehicles` renders its own images)
Writes  artifacts/prepare/, artifacts/warnings.csv, metrics/prepare.json
"""

import hashlib
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace

from pipeline.data import requirements
from pipeline.data.images import build_cache, data_root
from pipeline.data.inspection import (
    Inspection,
    changed_files,
    check_limits,
    deduplicate,
    duplicates_in_test,
    find_leaks,
    inspect,
    near_duplicates,
    unlabelled_copies,
    unlabelled_overlaps,
)
from pipeline.data.layout import UNKNOWN
from pipeline.data.manifest import UNLABELLED, DataError, ImageWarning, Item, Manifest, by_kind, first_few
from pipeline.data.sources import read_source
from pipeline.data.splits import split_test, split_validation
from pipeline.files import Files, csv_text, write_text
from pipeline.protocols import PROTOCOLS
from pipeline.records import PrepareRecord
from pipeline.stage.run import Run, run_stage

log = logging.getLogger(__name__)

OVERLAP = "unlabelled image is left out: it shows a part of the same file as a test or validation image"


def prepare(run: Run) -> PrepareRecord:
    """Render or read the images, inspect, split and cache them."""
    data, files, seed = run.params.data, run.files, run.params.seed
    root = data_root(files, run.params)
    if data.source == "vehicles":
        from pipeline.data.toy_vehicles import render  # needs two libraries that nothing else needs

        started = time.monotonic()
        shutil.rmtree(
            root, ignore_errors=True
        )  # `dvc repro` removes outputs itself; `python -m stages.prepare` does not
        render.render(root, seed, data.vehicles)
        run.timing("render", time.monotonic() - started)
    source = read_source(data, root)
    inspection = inspect(source.items, root)
    split_items = split_test(inspection.good, data.custom.test, seed, data.protocol)
    inspection = deduplicate(replace(inspection, good=split_items))
    leaks = find_leaks(inspection)
    near = near_duplicates(inspection, data.near_duplicate_bits)
    # Protocol market leaves such copies out: they have the query's identity and camera.
    copies = [] if PROTOCOLS[data.protocol].cameras else duplicates_in_test(inspection)
    warnings = [
        *source.warnings,
        *inspection.warnings,
        *(ImageWarning(test, "has the same pixels as a training image", train) for train, test in leaks),
        *(ImageWarning(copy, "has the same pixels as another test image", original) for original, copy in copies),
        *(
            ImageWarning(test, "looks like a training image", f"{train}, {bits} of 64 bits differ")
            for train, test, bits in near
        ),
    ]
    write_text(files.quarantine, csv_text(("path", "reason"), inspection.quarantined))
    _report(files, [], warnings)  # now, since the checks below may stop the stage
    check_limits(inspection, source.items, data.max_quarantined, data.max_leaked)
    items = split_validation(inspection.good, data.validation, seed, data.protocol)
    divided = replace(inspection, good=items)
    removals = {
        removal.path: removal
        for removal in (
            *(ImageWarning(name, OVERLAP, known) for known, name in unlabelled_overlaps(divided)),
            *(_removal(*copy) for copy in unlabelled_copies(divided, data.near_duplicate_bits)),
        )
    }
    if removals:
        _report(files, warnings, list(removals.values()))
        items = [item for item in items if item.name not in removals]
    _check_unlabelled(source.items, items, len(removals))
    requirements.check_requirements(items, run.params)
    for warning in requirements.warnings(items, run.params):
        log.warning("%s", warning)
    manifest = Manifest(items, root, data.closed_set)
    if data.cache:
        height, width = data.image_size
        build_cache(manifest, (height, width), files.image_cache)
    else:
        write_text(files.pixels, _digest_of_pixels(inspection, manifest) + "\n")
    if changed := changed_files(inspection, root):
        raise DataError(
            f"{len(changed)} images changed while they were read: {first_few(changed)}; run the stage again"
        )
    manifest.write(files.manifest)
    return PrepareRecord(
        images=len(manifest) - len(manifest.indices(UNLABELLED)),
        identities=len(manifest.known_identities),
        cameras=len({item.camera for item in manifest.items} - {UNKNOWN}),
        train=len(manifest.indices("train")),
        validation=len(manifest.indices("validation-query", "validation-gallery")),
        query=len(manifest.indices("query")),
        gallery=len(manifest.indices("gallery")),
        quarantined=len(inspection.quarantined),
        leaked=len(leaks),
        near_duplicates=len(near),
        test_identities=len(manifest.test_identities),
        seen_identities=manifest.seen_identities,
        unlabelled=len(manifest.indices(UNLABELLED)),
        unlabelled_removed=len(removals),
    )


def _report(files: Files, reported: Sequence[ImageWarning], new: Sequence[ImageWarning]) -> None:
    """Write all warnings to warnings.csv, and log the new ones by kind."""
    write_text(files.warnings, csv_text(("path", "warning", "detail"), [*reported, *new]))
    for line in by_kind(new):
        log.warning("%s", line)


def _digest_of_pixels(inspection: Inspection, manifest: Manifest) -> str:
    pixels = {item.name: image.pixels for item, image in inspection.pairs}
    return hashlib.sha256("\n".join(pixels[item.name] for item in manifest.items).encode()).hexdigest()


def _removal(known: str, removed: str, bits: int | None) -> ImageWarning:
    if bits is None:
        return ImageWarning(removed, "unlabelled image is left out: a test or validation image has its pixels", known)
    kind = "unlabelled image is left out: it looks like a test or validation image"
    return ImageWarning(removed, kind, f"{known}, {bits} of 64 bits differ")


def _check_unlabelled(listed: Sequence[Item], used: Sequence[Item], removed: int) -> None:
    """Check that a data set with unlabelled images has some left.

    Raises:
        DataError: If all were removed or quarantined.
    """
    count = sum(item.split == UNLABELLED for item in listed)
    if count and not any(item.split == UNLABELLED for item in used):
        raise DataError(
            f"none of the {count} unlabelled images can be used: {removed} left out because of test or validation "
            f"images (see warnings.csv), {count - removed} unreadable (see quarantine.csv); add others, or list none"
        )


if __name__ == "__main__":
    run_stage(prepare)
