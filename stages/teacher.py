"""Stage `teacher`: train the large network that the student learns from, or check one that was trained elsewhere.

Reads   artifacts/prepare/
Writes  artifacts/teacher/, metrics/teacher.json, plots/teacher.csv
"""

import logging

from pipeline.data.augment import normalise
from pipeline.data.images import open_images
from pipeline.data.loader import training_loader
from pipeline.data.requirements import check_requirements, unwatched_weights
from pipeline.models.resnet import TeacherNet
from pipeline.records import TeacherRecord
from pipeline.retrieval.embed import evaluate
from pipeline.retrieval.scoring import scores
from pipeline.runtime import launch
from pipeline.stage.run import Run, run_stage
from pipeline.teachers.given import given_teacher, save
from pipeline.training.loop import Fit
from pipeline.training.teacher import TeacherTask, build_teacher, validator

log = logging.getLogger(__name__)


def teacher(run: Run) -> TeacherRecord:
    """Train the teacher or load it, write it, and evaluate it on the test set."""
    params = run.params
    fabric = launch(params.runtime, params.seed)
    manifest, images = open_images(run.files, params)
    check_requirements(manifest.items, params)
    if warning := unwatched_weights("teacher", params):
        log.warning(warning)
    validate = validator(manifest, images, params.data.protocol, normalise, fabric.device)
    if params.teacher.source == "train":
        loader = training_loader(manifest, images, params.teacher, params, fabric.global_rank, fabric.world_size)
        task = TeacherTask(params.teacher, validate)
        fit = Fit(fabric, params.teacher, task, loader, normalise, run.checkpoints("data", "teacher"), run.curve)
        net: TeacherNet = fit.run(lambda: build_teacher(params.teacher, len(manifest.train_identities)))
        splits = ("query", "gallery")
        retrieval = evaluate(net, manifest, images, *splits, params.data.protocol, normalise, fabric.device)
    else:
        net, retrieval = given_teacher(params, manifest, images, fabric.device)
        run.curve({"epoch": 0.0, **({"validation_map": validate(net)} if validate else {})})
    save(net, run.out)
    height, width = params.data.image_size
    return TeacherRecord(
        **scores(params.data.protocol, retrieval).model_dump(),
        params=net.count_params(),
        macs=net.count_macs((height, width)),
    )


if __name__ == "__main__":
    run_stage(teacher)
