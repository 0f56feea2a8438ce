"""Optimisers, their learning rate over time, and their state by parameter name."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pipeline.config import Optimizer
from pipeline.models.resnet import RetrievalNet
from pipeline.models.spec import indicator_of


def build(net: RetrievalNet, config: Optimizer) -> torch.optim.Optimizer:
    """An optimiser over a network: no weight decay on compactors and gates, an own learning rate for the classifier.

    Each parameter group carries ``factor``, what its learning rate is multiplied by.
    """
    indicators = {f"{indicator_of(site)}.weight" for site in net.spec.indicators}
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in net.named_parameters():
        factor = config.classifier_lr if name.startswith("classifier.") else 1.0
        decay = 0.0 if name in indicators else config.weight_decay
        groups.setdefault((factor, decay), []).append(parameter)
    described = [
        {"params": params, "factor": factor, "weight_decay": decay, "lr": config.lr * factor}
        for (factor, decay), params in groups.items()
    ]
    if config.name == "adamw":
        return torch.optim.AdamW(described, lr=config.lr)
    return torch.optim.SGD(described, lr=config.lr, momentum=config.momentum)


def learning_rate(progress: float, config: Optimizer) -> float:
    """Learning rate at a share of the training: linear warm-up from a tenth, plateau, cosine."""
    if progress < config.warmup:
        return config.lr * (0.1 + 0.9 * progress / config.warmup)
    if progress < config.hold:
        return config.lr
    fallen = 0.5 * (1 + math.cos(math.pi * (progress - config.hold) / max(1 - config.hold, 1e-12)))
    return config.lr * (config.final_lr + (1 - config.final_lr) * fallen)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all groups, each times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def state_tensors(optimizer: torch.optim.Optimizer, net: RetrievalNet) -> dict[str, Tensor]:
    """The optimiser's state as tensors named ``<key>/<parameter>``, such as ``exp_avg/conv1.weight``."""
    return {
        f"{key}/{name}": value
        for name, parameter in net.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def load_state_tensors(
    optimizer: torch.optim.Optimizer,
    net: RetrievalNet,
    tensors: Mapping[str, Tensor],
    change: Callable[[str, Tensor], Tensor] = lambda _, tensor: tensor,
) -> None:
    """Restore what `state_tensors` returned, into an optimiser over `net`.

    Args:
        optimizer: Fresh optimiser.
        net: Network it optimises.
        tensors: State by name.
        change: Applied to each parameter's name and state of the parameter's shape.
    """
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        by_parameter.setdefault(name, {})[kind] = value
    for name, parameter in net.named_parameters():
        changed = {
            kind: value if value.dim() == 0 else change(name, value)
            for kind, value in by_parameter.get(name, {}).items()
        }
        if changed:
            optimizer.state[parameter] = {
                # scalars such as Adam's step stay on the CPU, where torch keeps them
                kind: value.clone() if value.dim() == 0 else torch.empty_like(parameter).copy_(value)
                for kind, value in changed.items()
            }
