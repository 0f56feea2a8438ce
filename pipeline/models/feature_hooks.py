"""Forward hooks that collect the outputs of inner modules by module name."""

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

from torch import Tensor, nn


def unchanged(output: Tensor) -> Tensor:
    """Return the output itself, without a copy: a ReLU behind it may change it in place."""
    return output


def average_pool(output: Tensor) -> Tensor:
    """Average a feature map over its positions, (B, C, H, W) -> (B, C)."""
    return output.mean(dim=(2, 3))


class FeatureHooks:
    """Collects the outputs of named modules in a forward pass; reading them clears them, so no batch is kept in memory.

    Args:
        names: Module names, such as ``layer3`` or ``layer3.5.compactor2``.
        transform: Applied to each output before it is stored.
    """

    def __init__(self, net: nn.Module, names: Iterable[str], transform: Callable[[Tensor], Tensor] = unchanged) -> None:
        self._outputs: dict[str, Tensor] = {}
        self._transform = transform
        self._handles = [net.get_submodule(name).register_forward_hook(self._hook(name)) for name in names]

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._outputs[name] = self._transform(output)

        return hook

    def read(self) -> dict[str, Tensor]:
        """Return the outputs of the last forward pass by module name, and clear them."""
        outputs, self._outputs = self._outputs, {}
        return outputs

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
