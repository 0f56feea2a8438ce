"""The only training loop. What is particular to teacher or student comes in as a `Task`."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor

from pipeline.config import Optimizer, Training
from pipeline.models.resnet import Output, RetrievalNet
from pipeline.progress import track
from pipeline.training.optimizer import build, learning_rate, load_state_tensors, set_learning_rate, state_tensors
from pipeline.training.state import Checkpoints, TrainingState

log = logging.getLogger(__name__)

READ_EVERY = 50
"""Steps after which a diverged loss is found, at the latest."""

Batch = tuple[Tensor, Tensor, Tensor]
"""Images (B, 3, H, W) uint8, labels (B,), rows of the manifest (B,)."""

Forward = Callable[[Tensor], Output]
"""A network's forward pass."""


class DivergedError(RuntimeError):
    """The loss is NaN or infinite."""


class Loader(Protocol):
    """Batches of an epoch; the same for the same epoch."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Batches of one epoch, counted from 0."""
        ...


class Reshaped(NamedTuple):
    """A narrower network, and what maps a parameter's name and a tensor of its old shape to the new shape."""

    net: RetrievalNet
    carry: Callable[[str, Tensor], Tensor]


class Task(ABC):
    """What is particular to one training; by default the network keeps its shape and there is nothing to remember."""

    @abstractmethod
    def losses(
        self, net: RetrievalNet, forward: Forward, images: Tensor, labels: Tensor, progress: float
    ) -> dict[str, Tensor]:
        """Return the named losses of a batch of normalised images; ``loss`` is the one to minimise.

        `forward` runs `net` as Fabric wants it run (it may spread over devices); `progress` is the share of the
        training done before.
        """

    def step(self, net: RetrievalNet, optimizer: Callable[[], object], progress: float) -> None:
        """Let the optimiser step, and do what must be done around it."""
        optimizer()

    def reshape(self, net: RetrievalNet) -> Reshaped | None:
        """Return a narrower network at the end of an epoch, or None."""
        return None

    def measure(self, net: RetrievalNet, progress: float, validate: bool) -> dict[str, float]:
        """Return what else belongs into the epoch's row of the curve."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return what the task must remember."""
        return {}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:  # noqa: B027 - most have nothing to restore
        """Restore what `state_dict` returned."""


@dataclass(frozen=True)
class Fit:
    """One training, from the first epoch or from where it was interrupted.

    Attributes:
        preprocess: From uint8 images (B, 3, H, W) to what the network takes.
        report: Called with each row of the curve, restored rows included.
    """

    fabric: Fabric
    config: Training
    task: Task
    loader: Loader
    preprocess: Callable[[Tensor], Tensor]
    checkpoints: Checkpoints
    report: Callable[[dict[str, float]], None]

    def run(self, start: Callable[[], RetrievalNet]) -> RetrievalNet:
        """Train, from the network that `start` makes or from a saved state, and return the network in evaluation mode.

        Raises:
            DivergedError: If the loss becomes NaN or infinite; the last good state stays on disk.
        """
        for state in self.states(start):
            net = state.net
        return net.eval()

    def states(self, start: Callable[[], RetrievalNet]) -> Iterator[TrainingState]:
        """Train epoch by epoch: yield the state that training begins with, and that after each epoch."""
        optimizer: Optimizer = self.config.optimizer
        state = self.checkpoints.restore(optimizer, self.fabric)
        if state is None:
            net = start().to(self.fabric.device).to(memory_format=torch.channels_last)
            state = TrainingState(net, build(net, optimizer))
        else:
            self.task.load_state_dict(state.extra)
        for row in state.curve:
            self.report(row)
        yield state
        while state.epoch < self.config.epochs:
            state = self._epoch(state)
            if self.fabric.is_global_zero:
                self.checkpoints.save(state)
            self.report(state.curve[-1])
            log.info("epoch %d of %d: %s", state.epoch, self.config.epochs, _summary(state.curve[-1]))
            yield state

    def _epoch(self, state: TrainingState) -> TrainingState:
        """Return the state after one more pass over the data."""
        net, epoch = state.net, state.epoch
        wrapped, optimizer = self.fabric.setup(net, state.optimizer)
        net.train()
        # The curve's sums stay on the device, because reading a number waits for all that the device has to do. They
        # are float64, as Python's numbers are, so that no digit of the curve depends on where they are added up.
        sums: dict[str, Tensor] = {}
        checked, steps = 0, len(self.loader)
        batches = track(self.loader.epoch(epoch), steps, f"epoch {epoch + 1} of {self.config.epochs}")
        for number, (images, labels, _) in enumerate(batches, start=1):
            progress = (epoch * steps + number - 1) / (self.config.epochs * steps)
            set_learning_rate(optimizer, learning_rate(progress, self.config.optimizer))
            inputs = self.preprocess(self.fabric.to_device(images)).contiguous(memory_format=torch.channels_last)
            losses = self.task.losses(net, wrapped, inputs, self.fabric.to_device(labels), progress)
            optimizer.zero_grad(set_to_none=True)
            self.fabric.backward(losses["loss"])
            self.task.step(net, optimizer.step, progress)
            for name, value in losses.items():
                share = value.detach().double() / steps
                sums[name] = sums[name] + share if name in sums else share
            if number % READ_EVERY == 0 or number == steps:
                if not sums["loss"].isfinite():  # a sum stays NaN or infinite once a loss was
                    raise DivergedError(
                        f"the loss became NaN or infinite in epoch {epoch + 1}, steps {checked + 1} to {number}; lower "
                        f"`optimizer.lr`, or look at {_values(losses)}"
                    )
                checked = number
        for buffer in net.buffers():  # each device has seen other images; all go on with the mean of their statistics
            if buffer.is_floating_point():
                buffer.copy_(cast(Tensor, self.fabric.all_reduce(buffer, reduce_op="mean")))
        net.eval()
        done = replace(state, epoch=epoch + 1)
        reshaped = self.task.reshape(net)
        if reshaped is not None:
            carried = state_tensors(state.optimizer, net)
            done.net = reshaped.net
            done.optimizer = build(done.net, self.config.optimizer)
            load_state_tensors(done.optimizer, done.net, carried, reshaped.carry)
        validate = done.epoch % self.config.validate_every == 0 or done.epoch == self.config.epochs
        measured = self.task.measure(done.net, done.epoch / self.config.epochs, validate)
        done.curve = [*state.curve, {"epoch": done.epoch, **_values(sums), **measured}]
        done.extra = self.task.state_dict()
        return done


def _values(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Read scalars from the device, by name."""
    return {name: float(value.detach()) for name, value in tensors.items()}


def _summary(row: dict[str, float]) -> str:
    """A row of the curve in a line."""
    return ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "epoch")
