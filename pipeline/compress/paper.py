"""Shrinker dynamic distillation as published: a memory of teacher features, masks that only grow, and a group lasso.

For each image, the teacher's nearest neighbours in the memory say which channels their match needs. A channel that is
among the least contributing ones for all images and all neighbours of a batch is unimportant: from then on retrieval
moves its row no more, and the lasso, which pulls at every row, takes it to zero or thereabouts.

Source: Xie et al., "Towards a Smaller Student", CVPR 2023, section 3.3, and its public code; restated for any batch
size. What the budgeted method does otherwise is told in `capacity`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.compress.budget import least_widths, shrinking_sites
from pipeline.compress.compactor import by_row, reset_gradients, row_norms
from pipeline.compress.compression import Compression
from pipeline.config import Student
from pipeline.models.cost import CostModel
from pipeline.models.resnet import RetrievalNet
from pipeline.models.spec import ArchSpec


def unimportant(student: Tensor, teacher: Tensor, memory: Tensor, neighbours: int, ratio: float) -> Tensor:
    """Channels that no match of this batch needs.

    The contribution of channel c to the match of image i with neighbour n is |t[n, c] * s[i, c]|, both features
    L2-normalised over the channels.

    Args:
        student: (B, C), pooled student features behind the compactor.
        teacher: (B, C), pooled teacher features of the same images.
        memory: (M, C), normalised teacher features to find neighbours in.
        neighbours: k; fewer where the memory holds fewer.
        ratio: Share of the channels, rounded down, that contribute least to a match; ties with the last of them count.

    Returns:
        (C,) bool: whether a channel is among these for all images and all of their neighbours.
    """
    count = int(ratio * student.shape[1])
    if not len(memory) or not count:
        return torch.zeros(student.shape[1], dtype=torch.bool, device=student.device)
    student, teacher = functional.normalize(student), functional.normalize(teacher)
    nearest = (teacher @ memory.T).topk(min(neighbours, len(memory)), dim=1).indices
    contributions = (memory[nearest] * student[:, None]).abs()  # (B, k, C)
    limit = contributions.kthvalue(count, dim=2, keepdim=True).values
    return (contributions <= limit).flatten(0, 1).all(dim=0)


def lasso_gradient(matrix: Tensor) -> Tensor:
    """Gradient of the sum of the rows' L2 norms, (C, ...) -> same; zero for a row of zeros."""
    norms = row_norms(matrix)
    return matrix / by_row(torch.where(norms > 0, norms, torch.ones_like(norms)), matrix)


@dataclass
class PaperSite:
    """One site.

    Attributes:
        masked: (C,) bool, rows that retrieval moves no more.
        memory: (M, C) float32, normalised teacher features; its first rows until it is full.
        seen: Features that were ever put into it; the oldest ones are overwritten.
    """

    masked: Tensor
    memory: Tensor
    seen: int = 0

    @property
    def filled(self) -> Tensor:
        """What is remembered, (at most M, C)."""
        return self.memory[: self.seen]

    def remember(self, features: Tensor) -> None:
        """Put normalised features (B, C) into the memory, over the oldest ones where it is full."""
        limit = len(self.memory)
        rows = (self.seen + torch.arange(len(features), device=features.device)) % limit
        self.memory[rows[-limit:]] = features[-limit:]
        self.seen += len(features)


class PaperMethod(Compression):
    """Masks and lasso of the published method; nothing is cut out before surgery, and no reduction is promised."""

    def __init__(self, spec: ArchSpec, config: Student, cost: CostModel, steps: int, device: torch.device) -> None:
        super().__init__(cost)
        self.spec, self.config, self.steps, self.progress = spec, config, steps, 0.0
        self.sites: dict[str, PaperSite] = {}
        for name in shrinking_sites(spec, config):
            width = spec.widths[name]
            masked = torch.zeros(width, dtype=torch.bool, device=device)
            self.sites[name] = PaperSite(masked, torch.zeros(config.paper.memory, width, device=device))

    @property
    def kept(self) -> dict[str, Tensor]:
        """All channels, by site."""
        return {name: torch.arange(len(site.masked), device=site.masked.device) for name, site in self.sites.items()}

    @property
    def observed(self) -> tuple[str, ...]:
        """Sites whose features it looks at."""
        return tuple(self.sites)

    def remaining(self, net: RetrievalNet) -> dict[str, int]:
        """Widths of the whole network if all rows that are dead by now were gone, in whole multiples."""
        multiple, widths = self.config.channel_multiple, dict(self.spec.widths)
        for name, least in least_widths(self.spec, self.sites, multiple).items():
            norms = row_norms(net.indicators()[name].matrix.detach())
            living = int((norms > self.config.paper.threshold).sum())
            widths[name] = min(widths[name], max(least, -(-living // multiple) * multiple))
        return widths

    def observe(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> None:
        """Grow the masks from one batch, and remember the teacher's features.

        Args:
            student: By site, (B, C) pooled features behind the compactor.
            teacher: By site, (B, C).
        """
        paper = self.config.paper
        for name, site in self.sites.items():
            seen = teacher[name].to(torch.float32)
            if self.progress >= paper.start:
                useless = unimportant(
                    student[name].detach().to(torch.float32), seen, site.filled, paper.neighbours, paper.ratio
                )
                site.masked = site.masked | useless
            site.remember(functional.normalize(seen))

    def step(self, net: RetrievalNet, optimizer: Callable[[], object], progress: float) -> None:
        """After the backward pass: take retrieval from masked rows, add the lasso, step."""
        indicators = net.indicators()
        if progress >= self.config.paper.start:
            reset_gradients((indicators[name].weight, site.masked) for name, site in self.sites.items())
            for indicator in indicators.values():
                if indicator.weight.grad is not None:
                    indicator.weight.grad += self.config.paper.lasso * lasso_gradient(indicator.weight.detach())
        optimizer()
        number = round(progress * self.steps) + 1
        self.progress = number / self.steps
        if number == self.steps:
            self._close(net)

    @torch.no_grad()
    def _close(self, net: RetrievalNet) -> None:
        """Make dead rows exactly zero; so many of the longest stay that widths are whole multiples.

        Dead ones that stay let hardly anything through, but enough to be told from zeros.
        """
        widths, threshold = self.remaining(net), self.config.paper.threshold
        for name, indicator in net.indicators().items():
            norms = row_norms(indicator.matrix)
            order = torch.argsort(norms, descending=True, stable=True)
            filler = order[: widths[name]][norms[order[: widths[name]]] <= threshold]
            indicator.weight[order[widths[name] :]] = 0.0
            indicator.weight[filler] = 0.0
            indicator.matrix[filler, filler if indicator.matrix.shape[1] > 1 else 0] = 2 * threshold

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that changes, as tensors by name."""
        tensors = {"progress": torch.tensor(self.progress, dtype=torch.float64)}
        for name, site in self.sites.items():
            tensors |= {
                f"{name}/masked": site.masked,
                f"{name}/memory": site.filled,
                f"{name}/seen": torch.tensor(site.seen),
            }
        return tensors

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self.progress = float(tensors["progress"])
        for name, site in self.sites.items():
            site.masked = tensors[f"{name}/masked"].to(site.masked.device)
            remembered = tensors[f"{name}/memory"]
            site.memory[: len(remembered)] = remembered.to(site.memory.device)
            site.seen = int(tensors[f"{name}/seen"])
