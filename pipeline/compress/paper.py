"""Method `paper`: capacity dynamic distillation as published, with a memory of teacher features and a group lasso.

For each image, the nearest neighbours of its teacher feature in the memory show which channels a match needs. A channel
that is among the least contributing ones for all images of a batch and all of their neighbours is unimportant: it is
masked for the rest of the training, so the losses no longer move its row, and the lasso, which acts on every row and
from the first step on, drives it towards zero.

Source: Xie et al., "Towards a Smaller Student", CVPR 2023, section 3.3, and its public code; restated for any batch
size. `shrinker` describes how method `budget` differs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.compress.budget import minimum_widths, shrinking_sites
from pipeline.compress.compactor import expand_rows, reset_gradients, row_norms
from pipeline.compress.compression import Compression
from pipeline.config import Student
from pipeline.models.cost import CostModel
from pipeline.models.resnet import RetrievalNet
from pipeline.models.spec import ArchSpec


def unimportant_channels(student: Tensor, teacher: Tensor, memory: Tensor, neighbours: int, ratio: float) -> Tensor:
    """Find the channels that contribute little to every match of this batch.

    The contribution of channel c to the match of image i with neighbour n is |t[n, c] * s[i, c]|, both features
    L2-normalised over the channels.

    Args:
        student: (B, C), pooled student features behind the compactor.
        teacher: (B, C), pooled teacher features of the same images.
        memory: (M, C), normalised teacher features to find neighbours in.
        neighbours: k, nearest neighbours by cosine; fewer if the memory holds fewer.
        ratio: Share of the channels, rounded down, that contribute least to a match; channels that tie count as well.

    Returns:
        (C,) bool, True if a channel is among these for all images and all of their neighbours.
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
    """Return the gradient of the sum of the rows' L2 norms, (C, ...) -> same; zero for a row of zeros."""
    norms = row_norms(matrix)
    return matrix / expand_rows(torch.where(norms > 0, norms, torch.ones_like(norms)), matrix)


@dataclass
class PaperSite:
    """Mask and memory of one site.

    Attributes:
        masked: (C,) bool, channels with reset gradients.
        memory: (M, C) float32, normalised teacher features; rows from `seen` on are unused until it is full.
        seen: Features stored so far, including overwritten ones.
    """

    masked: Tensor
    memory: Tensor
    seen: int = 0

    @property
    def filled(self) -> Tensor:
        """The used part of the memory, (at most M, C)."""
        return self.memory[: self.seen]

    def store(self, features: Tensor) -> None:
        """Store normalised features (B, C), over the oldest ones if the memory is full."""
        limit = len(self.memory)
        slots = (self.seen + torch.arange(len(features), device=features.device)) % limit
        self.memory[slots[-limit:]] = features[-limit:]
        self.seen += len(features)


class PaperMethod(Compression):
    """Masks and lasso of the published method; channels are cut by stage surgery only, and there is no budget."""

    def __init__(self, spec: ArchSpec, config: Student, cost: CostModel, steps: int, device: torch.device) -> None:
        super().__init__(spec, cost)
        self.spec, self.config, self.steps, self.progress = spec, config, steps, 0.0
        self.sites: dict[str, PaperSite] = {}
        for name in shrinking_sites(spec, config):
            width = spec.widths[name]
            masked = torch.zeros(width, dtype=torch.bool, device=device)
            self.sites[name] = PaperSite(masked, torch.zeros(config.paper.memory, width, device=device))

    @property
    def kept(self) -> dict[str, Tensor]:
        """All channels of each site, since none is cut during training."""
        return {name: torch.arange(len(site.masked), device=site.masked.device) for name, site in self.sites.items()}

    @property
    def observed_sites(self) -> tuple[str, ...]:
        """All sites with an indicator."""
        return tuple(self.sites)

    def remaining_widths(self, net: RetrievalNet) -> dict[str, int]:
        """Return the widths of the whole network without rows below the threshold, rounded up to multiples."""
        multiple, widths = self.config.channel_multiple, dict(self.spec.widths)
        for name, minimum in minimum_widths(self.spec, self.sites, multiple).items():
            norms = row_norms(net.indicators()[name].matrix.detach())
            count = int((norms > self.config.paper.threshold).sum())
            widths[name] = min(widths[name], max(minimum, -(-count // multiple) * multiple))
        return widths

    def curve(self, net: RetrievalNet) -> dict[str, float]:
        """Return the share of masked rows, and the mean norms of masked and of other rows."""
        masked = torch.cat([site.masked for site in self.sites.values()])
        norms = torch.cat([row_norms(net.indicators()[name].matrix.detach()) for name in self.sites])
        groups = {"norm_of_masked_rows": norms[masked], "norm_of_other_rows": norms[~masked]}
        means = {name: float(group.mean()) for name, group in groups.items() if len(group)}
        return {"masked_rows": float(masked.float().mean()), **means}

    def observe(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> None:
        """Store the features (B, C) of the teacher in the memory, and grow the masks.

        They are stored first, as in the public code, so the nearest neighbour of an image is usually the image itself.
        """
        paper = self.config.paper
        for name, site in self.sites.items():
            features = teacher[name].to(torch.float32)
            site.store(functional.normalize(features))
            if self.progress >= paper.start:
                site.masked = site.masked | unimportant_channels(
                    student[name].detach().to(torch.float32), features, site.filled, paper.neighbours, paper.ratio
                )

    def step(self, net: RetrievalNet, optimizer: Callable[[], object], progress: float) -> None:
        """Reset the gradients of masked rows, add the gradient of the lasso, and take an optimiser step."""
        indicators = net.indicators()
        reset_gradients((indicators[name].weight, site.masked) for name, site in self.sites.items())
        for indicator in indicators.values():
            if indicator.weight.grad is not None:
                indicator.weight.grad += self.config.paper.lasso * lasso_gradient(indicator.weight.detach())
        optimizer()
        number = round(progress * self.steps) + 1
        self.progress = number / self.steps
        if number == self.steps:
            self._zero_small_rows(net)

    @torch.no_grad()
    def _zero_small_rows(self, net: RetrievalNet) -> None:
        """Zero the rows below the threshold, after the last step.

        The longest of them stay, as many as it takes to make the width a multiple; their norm becomes twice the
        threshold, small but distinguishable from zero.
        """
        widths, threshold = self.remaining_widths(net), self.config.paper.threshold
        for name, indicator in net.indicators().items():
            norms = row_norms(indicator.matrix)
            order = torch.argsort(norms, descending=True, stable=True)
            filler = order[: widths[name]][norms[order[: widths[name]]] <= threshold]
            indicator.weight[order[widths[name] :]] = 0.0
            indicator.weight[filler] = 0.0
            indicator.matrix[filler, filler if indicator.matrix.shape[1] > 1 else 0] = 2 * threshold

    def state_dict(self) -> dict[str, Tensor]:
        """Return progress, masks and memories, as tensors by name."""
        tensors = {"progress": torch.tensor(self.progress, dtype=torch.float64)}
        for name, site in self.sites.items():
            tensors |= {
                f"{name}/masked": site.masked,
                f"{name}/memory": site.filled,
                f"{name}/seen": torch.tensor(site.seen),
            }
        return tensors

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the result of `state_dict`."""
        self.progress = float(tensors["progress"])
        for name, site in self.sites.items():
            site.masked = tensors[f"{name}/masked"].to(site.masked.device)
            features = tensors[f"{name}/memory"]
            site.memory[: len(features)] = features.to(site.memory.device)
            site.seen = int(tensors[f"{name}/seen"])
