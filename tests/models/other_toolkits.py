"""Networks with the names and the functions of other toolkits, in narrow; their blocks are torchvision's.

Names follow the public code of KaiyangZhou/deep-person-reid, JDAI-CV/fast-reid and michuanhaohao/reid-strong-baseline.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck


class InstanceBatchNorm(nn.Module):
    def __init__(self, planes: int) -> None:
        super().__init__()
        self.half = planes // 2
        self.IN = nn.InstanceNorm2d(self.half, affine=True)
        self.BN = nn.BatchNorm2d(planes - self.half)

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.split(x, self.half, 1)
        return torch.cat((self.IN(first.contiguous()), self.BN(second.contiguous())), 1)


class Backbone(nn.Module):
    """A ResNet; `width` is 64 elsewhere."""

    def __init__(
        self, blocks: Sequence[int], width: int, last_stride: int, ibn: bool, unpadded: bool, basic: bool = False
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, ceil_mode=True) if unpadded else nn.MaxPool2d(3, 2, padding=1)
        kind, inputs = BasicBlock if basic else Bottleneck, width
        for index, (count, stride) in enumerate(zip(blocks, (1, 2, 2, last_stride), strict=True)):
            planes, stage = width * 2**index, []
            for number in range(count):
                step, outputs = stride if number == 0 else 1, planes * kind.expansion
                shortcut = None
                if step != 1 or inputs != outputs:
                    convolution = nn.Conv2d(inputs, outputs, 1, stride=step, bias=False)
                    shortcut = nn.Sequential(convolution, nn.BatchNorm2d(outputs))
                block = kind(inputs, planes, step, shortcut)
                if ibn and index < 3:
                    block.bn1 = InstanceBatchNorm(planes)
                stage.append(block)
                inputs = outputs
            self.add_module(f"layer{index + 1}", nn.Sequential(*stage))
        self.channels = inputs

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class TorchReid(Backbone):
    """`resnet50`, `resnet50_ibn_a` and, with `fc_dim`, `resnet50_fc512`."""

    def __init__(self, blocks: Sequence[int], width: int, last_stride: int, ibn: bool, fc_dim: int = 0) -> None:
        super().__init__(blocks, width, last_stride, ibn, unpadded=False)
        self.fc = None
        if fc_dim:
            self.fc = nn.Sequential(nn.Linear(self.channels, fc_dim), nn.BatchNorm1d(fc_dim), nn.ReLU())
        self.classifier = nn.Linear(fc_dim or self.channels, 7)

    def forward(self, x: Tensor) -> Tensor:
        pooled = super().forward(x).mean(dim=(2, 3))
        return pooled if self.fc is None else self.fc(pooled)


class FastReidHead(nn.Module):
    def __init__(self, channels: int, embedding_dim: int, gem: bool) -> None:
        super().__init__()
        self.pool_layer = nn.Module()
        self.gem = gem
        if gem:
            self.pool_layer.p = nn.Parameter(torch.ones(1) * 3)
        neck: list[nn.Module] = []
        if embedding_dim:
            neck.append(nn.Conv2d(channels, embedding_dim, 1, 1, bias=False))
            channels = embedding_dim
        neck.append(nn.BatchNorm2d(channels))
        neck[-1].bias.requires_grad_(False)
        self.bottleneck = nn.Sequential(*neck)
        self.weight = nn.Parameter(torch.randn(7, channels))

    def forward(self, features: Tensor) -> Tensor:
        if self.gem:
            p = self.pool_layer.p
            pooled = features.clamp(min=1e-6).pow(p).mean(dim=(2, 3), keepdim=True).pow(1.0 / p)
        else:
            pooled = features.mean(dim=(2, 3), keepdim=True)
        return self.bottleneck(pooled)[..., 0, 0]


class FastReid(nn.Module):
    """Takes RGB pixels in [0, 255]."""

    def __init__(
        self,
        blocks: Sequence[int],
        width: int,
        ibn: bool,
        embedding_dim: int = 0,
        gem: bool = True,
        basic: bool = False,
    ) -> None:
        super().__init__()
        mean, std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
        self.register_buffer("pixel_mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(std).view(1, -1, 1, 1))
        self.backbone = Backbone(blocks, width, 1, ibn, unpadded=True, basic=basic)
        self.heads = FastReidHead(self.backbone.channels, embedding_dim, gem)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.heads(self.backbone((pixels - self.pixel_mean) / self.pixel_std))


class StrongBaseline(nn.Module):
    """reid-strong-baseline with its BNNeck."""

    def __init__(self, blocks: Sequence[int], width: int) -> None:
        super().__init__()
        self.base = Backbone(blocks, width, 1, ibn=False, unpadded=False)
        self.bottleneck = nn.BatchNorm1d(self.base.channels)
        self.bottleneck.bias.requires_grad_(False)
        self.classifier = nn.Linear(self.base.channels, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.bottleneck(self.base(x).mean(dim=(2, 3)))


def randomised(net: nn.Module, seed: int = 0) -> nn.Module:
    """Fill norms with random numbers, those whose bias is not trained apart, and return the network for evaluation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.InstanceNorm2d):
                module.weight.uniform_(0.5, 1.5, generator=generator)
                if module.bias.requires_grad:
                    module.bias.normal_(0, 0.2, generator=generator)
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2, generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
    return net.eval()
