"""Params of a small network, and its teacher."""

import pytest
import torch

from pipeline.config import Params
from pipeline.models.resnet import RetrievalNet
from pipeline.stage.presets import load_preset
from pipeline.training.teacher import build_teacher
from tests.training.short_training import IDENTITIES, ROOT


@pytest.fixture(scope="module")
def params() -> Params:
    smoke = load_preset(ROOT, "smoke").model_dump()
    smoke["data"] |= {"image_size": [32, 32]}
    smoke["teacher"] |= {"depth": 26, "width": 16, "embedding_dim": 16, "epochs": 1}
    smoke["student"] |= {"epochs": 4, "validate_every": 1, "sites": ["conv1", "conv2"]}
    smoke["student"]["distill"] |= {"views": 0}
    smoke["student"]["budget"] |= {"reduction": 0.4, "start": 0.05, "end": 0.5, "fade": 0.15, "every": 2}
    return Params.model_validate(smoke)


@pytest.fixture(scope="module")
def teacher(params: Params) -> RetrievalNet:
    torch.manual_seed(0)
    return build_teacher(params.teacher, IDENTITIES).eval()
