"""The face of the compression methods of stage `student`."""

from collections.abc import Callable, Mapping

from torch import Tensor

from pipeline.models.cost import CostModel
from pipeline.models.resnet import RetrievalNet


class Compression:
    """What a method does to the student's channels while it learns; this one does nothing.

    It serves methods `none`, `static-magnitude` and `static-random`, which cut before the first step or not at all.

    Args:
        cost: What the budget counts.
        kept: Channels of the uncompressed network that the student starts with, (C,) int64 by site; all where a site is
            not named.
    """

    def __init__(self, cost: CostModel, kept: Mapping[str, Tensor] | None = None) -> None:
        self.cost = cost
        self._kept = dict(kept or {})

    @property
    def whole(self) -> bool:
        """Whether the student starts with all of the teacher's channels."""
        return not self._kept

    @property
    def kept(self) -> dict[str, Tensor]:
        """Channels of the uncompressed network that are still present, (C,) int64 by site."""
        return self._kept

    @property
    def compared(self) -> dict[str, Tensor]:
        """Which of them are compared with the teacher's, (C,) bool by site; all where a site is not named."""
        return {}

    @property
    def observed(self) -> tuple[str, ...]:
        """Sites where student and teacher are compared, for `observe`; where there are none, the stages' ends are."""
        return ()

    def observe(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> None:
        """Look at the features (B, C) of a batch, by site."""

    def step(self, net: RetrievalNet, optimizer: Callable[[], object], progress: float) -> None:
        """Let the optimiser step, and do what must be done around it."""
        optimizer()

    def remaining(self, net: RetrievalNet) -> dict[str, int]:
        """Return the widths of the whole network once everything that was given up is gone."""
        return dict(net.spec.widths)

    def due(self, progress: float) -> float | None:
        """Return the reduction that must be given up by now; None where none is promised."""
        return None

    def check(self, widths: Mapping[str, int]) -> None:
        """Refuse a trained student that does not keep to its budget."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that changes, as tensors by name."""
        return {}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
