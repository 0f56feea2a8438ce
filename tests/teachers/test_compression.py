"""ResNet-50 with IBN-a in the names of torchreid and fast-reid: loaded, compressed at -65 %, folded, cut, exported."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from pipeline.compress.student import build_student, remaining_spec
from pipeline.compress.surgery import largest_difference, run_surgery
from pipeline.config import Params
from pipeline.export.to_onnx import to_onnx
from pipeline.inference.session import open_session
from pipeline.models import cost
from pipeline.stage.presets import load_preset
from pipeline.teachers.state_dict import load_checkpoint, with_classifier
from tests.imports import ROOT
from tests.models.other_toolkits import FastReid, TorchReid, randomised
from tests.training.short_training import IDENTITIES, RandomImages, prepared, preprocess

R50 = (3, 4, 6, 3)
SIZE = (32, 32)


@pytest.fixture
def params() -> Params:
    content = load_preset(ROOT, "smoke").model_dump()
    content["data"] |= {"image_size": list(SIZE)}
    content["teacher"] |= {"source": "checkpoint", "weights": "weights/model.pth"}
    content["student"] |= {"epochs": 3, "sites": ["conv1", "conv2", "stream"]}
    content["student"]["budget"] |= {"reduction": 0.65, "start": 0.05, "end": 0.5, "fade": 0.15, "every": 2}
    return Params.model_validate(content)


@pytest.mark.parametrize(
    ("make", "key", "width"),
    [
        (lambda width: TorchReid(R50, width, 1, ibn=True), "state_dict", 16),
        (lambda width: FastReid(R50, width, ibn=True), "model", 16),
    ],
    ids=["torchreid", "fast-reid"],
)
def test_a_resnet50_ibn_loses_65_percent_and_is_cut_and_exported_without_a_change(
    params: Params, tmp_path: Path, make: Callable[[int], nn.Module], key: str, width: int
) -> None:
    torch.manual_seed(0)
    theirs = randomised(make(width))
    torch.save({key: theirs.state_dict(), "epoch": 60}, tmp_path / "model.pth")
    given = load_checkpoint(params.teacher.model_copy(update={"weights": str(tmp_path / "model.pth")}))
    directions = np.eye(IDENTITIES, given.spec.embedding_dim, dtype=np.float32)
    teacher = with_classifier(given, directions).eval()
    assert len(teacher.spec.instance_norms) == 13  # all blocks but those of layer4

    task, fit, _ = prepared(params, teacher, tmp_path / "checkpoints")
    student = fit.run(lambda: build_student(params, teacher, task.compression))
    task.check(student)
    small = remaining_spec(student)
    assert 0.65 <= 1 - cost.macs(small, SIZE) / cost.macs(teacher.spec, SIZE) <= 0.66
    assert small.widths["layer4"] == teacher.spec.widths["layer4"]  # the embedding, which galleries have

    images = preprocess(next(RandomImages().epoch(7)).images)
    result = run_surgery(student, teacher.spec, params.surgery, images)
    assert result.net.spec == small
    assert result.max_abs_diff <= 1e-10
    assert largest_difference(student.double(), result.net.double(), images.double()) <= 1e-4  # float32 weights
    session = open_session(to_onnx(result.net.float(), SIZE, 18).SerializeToString())
    (exported,) = session.run(None, {"image": images.contiguous().numpy()})
    with torch.no_grad():
        expected = functional.normalize(result.net(images).embedding).numpy()
    np.testing.assert_allclose(exported, expected, atol=1e-5)
