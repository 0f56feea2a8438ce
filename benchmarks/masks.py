"""Share of the channels that method `paper` masks, by its ratio: `python -m benchmarks.masks [FOLDER]`.

FOLDER holds params.yaml and a trained teacher, such as a clone in .ladder/. The teacher's features behind its 3x3
convolutions stand for the student's, so these are the masks of a student that has not moved, over the batches of three
epochs; `student.paper.start` is ignored.
"""

import sys
from pathlib import Path

import torch

from benchmarks.short import ROOT, with_values
from pipeline import checkpoint
from pipeline.compress.budget import cost_model, shrinking_sites
from pipeline.compress.paper import PaperMethod
from pipeline.compress.student import observed_module
from pipeline.data.augment import normalise
from pipeline.data.images import open_images
from pipeline.data.loader import training_loader
from pipeline.files import Files
from pipeline.models.feature_hooks import FeatureHooks, average_pool
from pipeline.runtime import limit_threads
from pipeline.stage.params_file import load

EPOCHS = 3
RATIOS = (0.5, 0.7, 0.9)
PUBLISHED = {
    "student.sites": ["conv2"],
    "student.batch.unlabelled": 0,
    "student.distill.views": 0,
    "student.distill.average_views": False,
}


def main(folder: Path) -> None:
    """Print a line for each ratio."""
    files = Files(folder, folder)
    params = with_values(load(files.params), PUBLISHED)
    limit_threads(params.runtime.threads)
    manifest, images = open_images(files, params)
    config, net = params.student, checkpoint.load(files.artifacts("teacher")).eval()
    loader = training_loader(manifest, images, config, params)
    names = {site: observed_module(site) for site in shrinking_sites(net.spec, config)}
    cost = cost_model(net.spec, config, (params.data.image_size[0], params.data.image_size[1]))
    methods = {}
    for ratio in RATIOS:
        paper = config.paper.model_copy(update={"ratio": ratio, "start": 0.0})
        changed = config.model_copy(update={"paper": paper})
        methods[ratio] = PaperMethod(net.spec, changed, cost, 1, torch.device("cpu"))
    with torch.no_grad(), FeatureHooks(net, names.values(), average_pool) as hooks:
        for batch in (batch for epoch in range(EPOCHS) for batch in loader.epoch(epoch)):
            net(normalise(batch.images))
            outputs = hooks.read()
            features = {site: outputs[name] for site, name in names.items()}
            for method in methods.values():
                method.observe(features, features)
    print(f"{EPOCHS * len(loader)} batches of {config.batch.size} images, {len(names)} sites")
    for ratio, method in methods.items():
        masked = torch.cat([site.masked for site in method.sites.values()])
        print(f"ratio {ratio}: {masked.float().mean():.1%} of the channels are masked")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
