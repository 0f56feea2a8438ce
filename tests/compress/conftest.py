"""Networks whose every number is random, so that nothing is equal by accident."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from pipeline.compress.compactor import attach, last_norm
from pipeline.models.resnet import RetrievalNet
from pipeline.models.spec import ArchSpec


def scramble(net: RetrievalNet, seed: int) -> RetrievalNet:
    """Fill weights and statistics with random numbers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.weight.normal_(generator=generator)
                module.bias.normal_(generator=generator)
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
    return net.double().eval()


def kill_rows(net: RetrievalNet, seed: int, multiple: int) -> None:
    """Mix channels in every compactor, change every gate, then zero random rows and blocks; whole multiples stay."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for indicator in net.indicators().values():
            channels = indicator.weight.shape[0]
            indicator.weight += 0.1 * torch.randn(indicator.weight.shape, generator=generator, dtype=torch.float64)
            groups = int(torch.randint(1, channels // multiple + 1, (1,), generator=generator))
            dead = torch.randperm(channels, generator=generator)[groups * multiple :]
            indicator.weight[dead] = 0.0
        for block in net.spec.removable:
            if torch.rand((), generator=generator) < 0.3:
                for site in block.sites:
                    net.indicators()[site].weight.zero_()
                for name in ("weight", "bias"):
                    getattr(net.get_submodule(last_norm(block)), name).zero_()


@pytest.fixture
def dying_net() -> Callable[..., RetrievalNet]:
    def make(depth: int = 14, seed: int = 0, multiple: int = 8, identities: int = 0) -> RetrievalNet:
        torch.manual_seed(seed)
        net = scramble(RetrievalNet(ArchSpec.full(depth, 16, 24, identities=identities)), seed)
        net = attach(net, net.spec.widths)
        kill_rows(net, seed, multiple)
        return net

    return make
