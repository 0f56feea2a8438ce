"""Networks with random weights, statistics and zero rows."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from pipeline.compress.compactor import attach, last_norm
from pipeline.models.resnet import RetrievalNet
from pipeline.models.spec import ArchSpec


def randomise_norms(net: RetrievalNet, seed: int) -> RetrievalNet:
    """Fill norms with random numbers, so that nothing is equal by accident."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.InstanceNorm2d):
                module.weight.normal_(generator=generator)
                if module.bias is not None:
                    module.bias.normal_(generator=generator)
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
    return net.double().eval()


def zero_random_rows(net: RetrievalNet, seed: int, multiple: int) -> None:
    """Change every indicator, then zero random rows and blocks; widths stay multiples."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for indicator in net.indicators().values():
            channels = indicator.weight.shape[0]
            indicator.weight += 0.1 * torch.randn(indicator.weight.shape, generator=generator, dtype=torch.float64)
            groups = int(torch.randint(1, channels // multiple + 1, (1,), generator=generator))
            zeroed = torch.randperm(channels, generator=generator)[groups * multiple :]
            indicator.weight[zeroed] = 0.0
        for block in net.spec.removable:
            if torch.rand((), generator=generator) < 0.3:
                for site in block.sites:
                    net.indicators()[site].weight.zero_()
                for name in ("weight", "bias"):
                    getattr(net.get_submodule(last_norm(block)), name).zero_()


@pytest.fixture
def net_with_zero_rows() -> Callable[..., RetrievalNet]:
    def make(depth: int = 14, seed: int = 0, multiple: int = 8, identities: int = 0, **variant: object) -> RetrievalNet:
        torch.manual_seed(seed)
        streams = 128 if depth in (18, 34) else 512
        dim = 24 if "fc" in str(variant.get("head", "fc")) else streams
        net = randomise_norms(RetrievalNet(ArchSpec.full(depth, 16, dim, identities=identities, **variant)), seed)
        net = attach(net, [site for site in net.spec.widths if net.spec.has_linear or site != "layer4"])
        zero_random_rows(net, seed, multiple)
        return net

    return make
