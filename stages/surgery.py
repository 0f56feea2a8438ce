"""Stage `surgery`: fold the compactors and cut out the channels that are zero.

Reads   artifacts/prepare/, artifacts/student/
Writes  artifacts/surgery/, metrics/surgery.json
"""

from pipeline import checkpoint
from pipeline.compress.surgery import SurgeryPlan, run_surgery
from pipeline.data.augment import as_tensor, normalise
from pipeline.data.images import open_images
from pipeline.data.requirements import check_requirements
from pipeline.models import cost
from pipeline.records import SurgeryRecord
from pipeline.retrieval.embed import evaluate
from pipeline.retrieval.scoring import scores
from pipeline.runtime import launch
from pipeline.stage.run import Run, run_stage


def surgery(run: Run) -> SurgeryRecord:
    """Cut the student, verify in float64 that its function is the same, write it, and evaluate it on the test set."""
    params = run.params
    fabric = launch(params.runtime.alone(), params.seed)
    manifest, images = open_images(run.files, params)
    check_requirements(manifest.items, params)
    probe = normalise(as_tensor(images.batch(manifest.indices("query", "gallery")[:8])))
    full = checkpoint.load_spec(run.files.artifacts("student"), checkpoint.FULL)
    result = run_surgery(checkpoint.load(run.files.artifacts("student")), full, params.surgery, probe)
    result.plan.after(SurgeryPlan.read(run.files.artifacts("student"))).write(run.out)
    checkpoint.save(run.out, result.net)
    net = result.net.to(fabric.device)
    protocol = params.data.protocol
    retrieval = evaluate(net, manifest, images, "query", "gallery", protocol, normalise, fabric.device)
    height, width = params.data.image_size
    params_left, macs_left = cost.params(net.spec), cost.macs(net.spec, (height, width))
    return SurgeryRecord(
        **scores(protocol, retrieval).model_dump(),
        params=params_left,
        macs=macs_left,
        params_reduction=1 - params_left / cost.params(full),
        macs_reduction=1 - macs_left / cost.macs(full, (height, width)),
        max_abs_diff=result.max_abs_diff,
        widths=net.spec.widths,
    )


if __name__ == "__main__":
    run_stage(surgery)
