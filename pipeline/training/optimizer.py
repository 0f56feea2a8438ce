"""Optimisers, the learning-rate schedule, and optimiser state by parameter name."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pipeline.config import Optimizer
from pipeline.models.resnet import RetrievalNet
from pipeline.models.spec import EXPONENT, indicator_name


def build_optimizer(net: RetrievalNet, config: Optimizer) -> torch.optim.Optimizer:
    """Build an optimiser: no weight decay on indicators and exponents, a separate learning rate for the classifier.

    The entry ``factor`` of each parameter group is multiplied with the learning rate.
    """
    undecayed = {EXPONENT, *(f"{indicator_name(site)}.weight" for site in net.spec.indicators)}
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in net.named_parameters():
        factor = config.classifier_lr if name.startswith("classifier.") else 1.0
        decay = 0.0 if name in undecayed else config.weight_decay
        groups.setdefault((factor, decay), []).append(parameter)
    param_groups = [
        {"params": params, "factor": factor, "weight_decay": decay, "lr": config.lr * factor}
        for (factor, decay), params in groups.items()
    ]
    if config.name == "adamw":
        return torch.optim.AdamW(param_groups, lr=config.lr)
    return torch.optim.SGD(param_groups, lr=config.lr, momentum=config.momentum)


def learning_rate(progress: float, config: Optimizer) -> float:
    """Return the learning rate at a progress in [0, 1]: linear warm-up from a tenth, plateau, cosine decay."""
    if progress < config.warmup:
        return config.lr * (0.1 + 0.9 * progress / config.warmup)
    if progress < config.hold:
        return config.lr
    cosine = 0.5 * (1 + math.cos(math.pi * (progress - config.hold) / max(1 - config.hold, 1e-12)))
    return config.lr * (config.final_lr + (1 - config.final_lr) * cosine)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group, multiplied by the group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def state_tensors(optimizer: torch.optim.Optimizer, net: RetrievalNet) -> dict[str, Tensor]:
    """Return the optimiser's state as tensors named ``<key>/<parameter>``, such as ``exp_avg/conv1.weight``."""
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
    convert: Callable[[str, Tensor], Tensor] = lambda _, tensor: tensor,
) -> None:
    """Restore the result of `state_tensors` into a new optimiser over `net`.

    `convert` receives a parameter's name and a state tensor, and returns the tensor in the parameter's new shape;
    scalars are restored without it.
    """
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        by_parameter.setdefault(name, {})[kind] = value
    for name, parameter in net.named_parameters():
        converted = {
            kind: value if value.dim() == 0 else convert(name, value)
            for kind, value in by_parameter.get(name, {}).items()
        }
        if converted:
            optimizer.state[parameter] = {
                # scalars such as Adam's step stay on the CPU, where torch keeps them
                kind: value.clone() if value.dim() == 0 else torch.empty_like(parameter).copy_(value)
                for kind, value in converted.items()
            }
