"""The interface of the compression methods of stage `student`."""

from collections.abc import Callable, Mapping

from torch import Tensor

from pipeline.models.cost import CostModel
from pipeline.models.resnet import RetrievalNet
from pipeline.models.spec import ArchSpec


class Compression:
    """What a method does to the student's channels during training; this base class does nothing.

    It serves the methods `none`, `static-magnitude` and `static-random`, which prune before the first step or not at
    all.

    Args:
        full: Spec of the uncompressed student.
        cost: The cost that the budget limits.
        kept: Channels of the uncompressed network that the student starts with, (C,) int64 by site; all channels of
            sites that are missing.
    """

    def __init__(self, full: ArchSpec, cost: CostModel, kept: Mapping[str, Tensor] | None = None) -> None:
        self.full, self.cost = full, cost
        self._kept = dict(kept or {})

    @property
    def starts_full(self) -> bool:
        """Whether the student starts with all channels."""
        return not self._kept

    @property
    def kept(self) -> dict[str, Tensor]:
        """Channels of the uncompressed network that are still present, (C,) int64 by site."""
        return self._kept

    @property
    def compared_channels(self) -> dict[str, Tensor]:
        """Which present channels the feature loss compares, (C,) bool by site; all channels of sites that are missing.

        Masked channels are left out: their distance to the teacher would outweigh that of the others.
        """
        return {}

    @property
    def observed_sites(self) -> tuple[str, ...]:
        """Sites with features that `observe` needs; if there are none, features are compared at the ends of stages."""
        return ()

    def observe(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> None:
        """Process the pooled features (B, C) of a batch, by site."""

    @property
    def scores_embeddings(self) -> bool:
        """Whether the next step needs `observe_scores`."""
        return False

    def observe_scores(self, scores: Mapping[str, Tensor]) -> None:
        """Process the importance (C,) of all channels for the embeddings of a batch, by site."""

    def step(self, net: RetrievalNet, optimizer: Callable[[], object], progress: float) -> None:
        """Take an optimiser step, with the work of the method before and after it."""
        optimizer()

    def remaining_widths(self, net: RetrievalNet) -> dict[str, int]:
        """Return the widths of the whole network without the channels that the method has selected for removal."""
        return dict(net.spec.widths)

    def target_reduction(self, progress: float) -> float | None:
        """Return the reduction scheduled for this progress in [0, 1]; None if the method has no schedule."""
        return None

    def curve(self, net: RetrievalNet) -> dict[str, float]:
        """Return further values for the epoch's row of the curve, by name."""
        return {}

    def check(self, widths: Mapping[str, int]) -> None:
        """Check that the widths of a trained student keep the budget.

        Raises:
            BudgetMissedError: If they do not.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state to save with a training checkpoint, as tensors by name."""
        return {}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the result of `state_dict`."""
