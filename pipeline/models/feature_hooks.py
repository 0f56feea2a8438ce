"""Outputs of inner modules, by module name."""

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

from torch import Tensor, nn


def whole(output: Tensor) -> Tensor:
    """The output itself; a ReLU behind it may change it in place."""
    return output


def pooled(output: Tensor) -> Tensor:
    """Mean over the positions of a feature map, (B, C, H, W) -> (B, C)."""
    return output.mean(dim=(2, 3))


class FeatureHooks:
    """Catches what named modules put out; reading empties it, so that nothing outlives its batch.

    Args:
        net: Network that is listened to.
        names: Module names, such as ``layer3`` or ``layer3.5.compactor2``.
        view: What is kept of an output.
    """

    def __init__(self, net: nn.Module, names: Iterable[str], view: Callable[[Tensor], Tensor] = whole) -> None:
        self._caught: dict[str, Tensor] = {}
        self._view = view
        self._handles = [net.get_submodule(name).register_forward_hook(self._catch(name)) for name in names]

    def _catch(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._caught[name] = self._view(output)

        return hook

    def read(self) -> dict[str, Tensor]:
        """What the last forward pass put out, by module name."""
        caught, self._caught = self._caught, {}
        return caught

    def close(self) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
