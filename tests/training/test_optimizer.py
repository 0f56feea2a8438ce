"""Which parameters decay, and which have a learning rate of their own."""

from pipeline.compress.compactor import attach
from pipeline.config import Params
from pipeline.models.resnet import RetrievalNet
from pipeline.models.spec import ArchSpec
from pipeline.training.optimizer import build_optimizer


def test_what_scales_channels_or_is_an_exponent_does_not_decay(params: Params) -> None:
    spec = ArchSpec.full(14, 8, 16, identities=5, ibn=True, pool="gem")
    net = attach(RetrievalNet(spec), ["layer1", "layer1.0.conv1", "layer1.0.conv2"])
    config = params.student.optimizer.model_copy(update={"classifier_lr": 2.0})
    optimizer = build_optimizer(net, config)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    groups = {
        names[id(parameter)]: (group["weight_decay"], group["factor"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert set(groups) == set(names.values())
    exempt = {"gates.layer1.weight", "layer1.0.compactor1.weight", "layer1.0.compactor2.weight", "head.pool.p"}
    assert {name for name, (decay, _) in groups.items() if decay == 0} == exempt
    assert {name for name, (_, factor) in groups.items() if factor == 2.0} == {"classifier.weight"}
