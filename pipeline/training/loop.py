"""The only training loop; a `Task` adds the losses and hooks of the teacher or the student."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor

from pipeline.config import Optimizer, Training
from pipeline.data.loader import TrainBatch
from pipeline.models.resnet import Output, RetrievalNet
from pipeline.progress import track
from pipeline.training.optimizer import (
    build_optimizer,
    learning_rate,
    load_state_tensors,
    set_learning_rate,
    state_tensors,
)
from pipeline.training.state import Checkpoints, TrainingState

log = logging.getLogger(__name__)

READ_EVERY = 50
"""Steps between two checks for a diverged loss; each check waits for the device."""

Forward = Callable[[Tensor], Output]
"""The forward pass of a network, from normalised images (B, 3, H, W)."""


class DivergedError(RuntimeError):
    """The loss is NaN or infinite."""


class Loader(Protocol):
    """Yields batches that depend only on the epoch; its length is the number of batches per epoch."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int) -> Iterator[TrainBatch]:
        """Yield the batches of an epoch, counted from 0."""
        ...


class Reshaped(NamedTuple):
    """A narrower network, and a function from a parameter's name and a tensor of its old shape to the new shape."""

    net: RetrievalNet
    carry: Callable[[str, Tensor], Tensor]


class Task(ABC):
    """The losses and hooks of one kind of training; by default the network keeps its shape and there is no state."""

    @abstractmethod
    def losses(self, net: RetrievalNet, forward: Forward, batch: TrainBatch, progress: float) -> dict[str, Tensor]:
        """Return the losses of a batch by name; ``loss`` is the one that is minimised.

        Args:
            net: Network in training mode.
            forward: Runs `net` as wrapped by Fabric (on several devices, gradients are synchronised).
            batch: Normalised images and labels, on the device.
            progress: Share of the training done before this step, in [0, 1).
        """

    def step(self, net: RetrievalNet, optimizer: Callable[[], object], progress: float) -> None:
        """Take an optimiser step, after the backward pass."""
        optimizer()

    def reshape(self, net: RetrievalNet) -> Reshaped | None:
        """Return a narrower network at the end of an epoch, or None."""
        return None

    def measure(self, net: RetrievalNet, progress: float, validate: bool) -> dict[str, float]:
        """Return further values for the epoch's row of the curve, with those of a validation if `validate` is set."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state to save with a checkpoint, as tensors by name."""
        return {}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:  # noqa: B027 - most tasks have no state
        """Restore the result of `state_dict`."""


@dataclass(frozen=True)
class Fit:
    """A training, from the first epoch or from the last saved state.

    Attributes:
        preprocess: Converts uint8 images (B, 3, H, W) to normalised ones.
        report: Receives each row of the curve, including restored rows.
    """

    fabric: Fabric
    config: Training
    task: Task
    loader: Loader
    preprocess: Callable[[Tensor], Tensor]
    checkpoints: Checkpoints
    report: Callable[[dict[str, float]], None]

    def run(self, start: Callable[[], RetrievalNet]) -> RetrievalNet:
        """Train the network that `start` builds, or continue from a saved state; return it in evaluation mode.

        Raises:
            DivergedError: If the loss becomes NaN or infinite; the last good state stays on disk.
        """
        for state in self.states(start):
            net = state.net
        return net.eval()

    def states(self, start: Callable[[], RetrievalNet]) -> Iterator[TrainingState]:
        """Train epoch by epoch; yield the initial or restored state, and the state after each epoch."""
        optimizer: Optimizer = self.config.optimizer
        state = self.checkpoints.restore(optimizer, self.fabric)
        if state is None:
            net = start().to(self.fabric.device).to(memory_format=torch.channels_last)
            state = TrainingState(net, build_optimizer(net, optimizer))
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
        # Losses are summed on the device, because reading a value waits for all queued work. The sums are float64 like
        # Python's floats, so that the curve has the same digits wherever they are added up.
        sums: dict[str, Tensor] = {}
        checked, steps = 0, len(self.loader)
        batches = track(self.loader.epoch(epoch), steps, f"epoch {epoch + 1} of {self.config.epochs}")
        for number, loaded in enumerate(batches, start=1):
            progress = (epoch * steps + number - 1) / (self.config.epochs * steps)
            set_learning_rate(optimizer, learning_rate(progress, self.config.optimizer))
            images, labels = self.fabric.to_device((loaded.images, loaded.labels))
            images = self.preprocess(images).contiguous(memory_format=torch.channels_last)
            batch = loaded._replace(images=images, labels=labels)
            losses = self.task.losses(net, wrapped, batch, progress)
            optimizer.zero_grad(set_to_none=True)
            self.fabric.backward(losses["loss"])
            self.task.step(net, optimizer.step, progress)
            for name, value in losses.items():
                share = value.detach().double() / steps
                sums[name] = sums[name] + share if name in sums else share
            if number % READ_EVERY == 0 or number == steps:
                if not sums["loss"].isfinite():  # a sum stays NaN or infinite once a loss was
                    raise DivergedError(
                        f"the loss became NaN or infinite in epoch {epoch + 1}, steps {checked + 1} to {number}: "
                        f"{_values(losses)}; lower `optimizer.lr`"
                    )
                checked = number
        for buffer in net.buffers():  # devices process different images; all continue with the mean of their statistics
            if buffer.is_floating_point():
                buffer.copy_(cast(Tensor, self.fabric.all_reduce(buffer, reduce_op="mean")))
        net.eval()
        done = replace(state, epoch=epoch + 1)
        reshaped = self.task.reshape(net)
        if reshaped is not None:
            carried = state_tensors(state.optimizer, net)
            done.net = reshaped.net
            done.optimizer = build_optimizer(done.net, self.config.optimizer)
            load_state_tensors(done.optimizer, done.net, carried, reshaped.carry)
        validate = done.epoch % self.config.validate_every == 0 or done.epoch == self.config.epochs
        measured = self.task.measure(done.net, done.epoch / self.config.epochs, validate)
        done.curve = [*state.curve, {"epoch": done.epoch, **_values(sums), **measured}]
        done.extra = self.task.state_dict()
        return done


def _values(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Return scalar tensors as floats; this waits for the device."""
    return {name: float(value.detach()) for name, value in tensors.items()}


def _summary(row: dict[str, float]) -> str:
    """Format a row of the curve for the log."""
    return ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "epoch")
