"""The only training loop. What is particular to teacher or student comes in as a `Task`."""

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor

from pipeline.config import Optimizer, Training
from pipeline.models.resnet import Output, RetrievalNet
from pipeline.progress import track
from pipeline.training.optim import build, learning_rate, load_state_tensors, set_learning_rate, state_tensors
from pipeline.training.state import Checkpoints, TrainingState

log = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor, Tensor]
"""Images (B, 3, H, W) uint8, labels (B,), rows of the manifest (B,)."""


Forward = Callable[[Tensor], Output]
"""A network's forward pass."""


class DivergedError(RuntimeError):
    """The loss is no number any more."""


class Loader(Protocol):
    """Batches of an epoch; the same for the same epoch."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Batches of one epoch, counted from 0."""
        ...


@dataclass(frozen=True)
class Reshaped:
    """A network that has become narrower.

    Attributes:
        net: The new network.
        carry: Maps a parameter's name and a tensor of its old shape (the optimiser's state) to the new shape.
    """

    net: RetrievalNet
    carry: Callable[[str, Tensor], Tensor]


class Task(Protocol):
    """What a training is about."""

    def losses(
        self, net: RetrievalNet, forward: Forward, images: Tensor, labels: Tensor, progress: float
    ) -> dict[str, Tensor]:
        """Named losses of a batch of normalised images; ``loss`` is the one to minimise.

        `forward` runs `net` as Fabric wants it run (it may spread over devices); `progress` is the share of the
        training done before.
        """
        ...

    def step(self, net: RetrievalNet, optimizer: Callable[[], object], progress: float) -> None:
        """Let the optimiser step, and do what must be done around it."""
        ...

    def reshape(self, net: RetrievalNet) -> Reshaped | None:
        """At the end of an epoch: a narrower network, or None."""
        ...

    def measure(self, net: RetrievalNet, progress: float, validate: bool) -> dict[str, float]:
        """What else belongs into the epoch's row of the curve."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """What the task must remember."""
        ...

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        ...


@dataclass(frozen=True)
class Fit:
    """One training, from the first epoch or from where it was interrupted.

    Attributes:
        fabric: Launched Fabric.
        config: Section of params.yaml.
        task: What is trained for.
        loader: Batches.
        preprocess: From uint8 images (B, 3, H, W) to what the network takes.
        checkpoints: Where states are saved after each epoch.
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
        """Train.

        Args:
            start: Makes the first network; not called when a saved state is found.

        Returns:
            The trained network, in evaluation mode.

        Raises:
            DivergedError: If the loss becomes NaN or infinite; the last good state stays on disk.
        """
        for state in self.states(start):
            net = state.net
        return net.eval()

    def states(self, start: Callable[[], RetrievalNet]) -> Iterator[TrainingState]:
        """The same, epoch by epoch: the state that training begins with, and that after each epoch.

        Args:
            start: Makes the first network; not called when a saved state is found.
        """
        optimizer: Optimizer = self.config.optimizer
        state = self.checkpoints.newest(optimizer, self.fabric.device)
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
        """One pass over the data, and what follows it."""
        net, epoch = state.net, state.epoch
        wrapped, optimizer = self.fabric.setup(net, state.optimizer)
        net.train()
        sums: dict[str, float] = defaultdict(float)
        steps = len(self.loader)
        batches = track(self.loader.epoch(epoch), steps, f"epoch {epoch + 1} of {self.config.epochs}")
        for number, (images, labels, rows) in enumerate(batches):
            progress = (epoch * steps + number) / (self.config.epochs * steps)
            set_learning_rate(optimizer, learning_rate(progress, self.config.optimizer))
            inputs = self.preprocess(self.fabric.to_device(images)).contiguous(memory_format=torch.channels_last)
            losses = self.task.losses(net, wrapped, inputs, self.fabric.to_device(labels), progress)
            values = {name: float(value.detach()) for name, value in losses.items()}
            if not math.isfinite(values["loss"]):
                raise DivergedError(
                    f"the loss is {values['loss']} in epoch {epoch + 1}, step {number + 1} (first row of the manifest "
                    f"in the batch: {int(rows[0])}); lower `optimizer.lr`, or look at {values}"
                )
            optimizer.zero_grad(set_to_none=True)
            self.fabric.backward(losses["loss"])
            self.task.step(net, optimizer.step, progress)
            for name, value in values.items():
                sums[name] += value / steps
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
        done.curve = [*state.curve, {"epoch": done.epoch, **sums, **measured}]
        done.extra = self.task.state_dict()
        return done


def _summary(row: dict[str, float]) -> str:
    """A row of the curve in a line."""
    return ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "epoch")
