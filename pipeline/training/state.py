"""The state of a training, as one object and as files to resume from."""

import json
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from lightning_fabric import Fabric
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.config import Optimizer
from pipeline.files import write_atomically
from pipeline.models.resnet import RetrievalNet
from pipeline.models.spec import ArchSpec
from pipeline.training.optimizer import build_optimizer, load_state_tensors, state_tensors

log = logging.getLogger(__name__)

GENERATIONS = 2
"""Saved states that are kept: the newest, and one to fall back on."""

Saved = tuple[dict[str, str], dict[str, Tensor]]
"""Content of a file: header, and tensors by name."""


@dataclass
class TrainingState:
    """The state after an epoch.

    All random choices derive from the seed and from epoch, step, view or image: random generators have no state here.

    Attributes:
        net: The network, which may be narrower than at the start.
        epoch: Number of completed epochs.
        curve: One row per epoch: mean losses and further measured values.
        extra: State of the task, by name.
    """

    net: RetrievalNet
    optimizer: torch.optim.Optimizer
    epoch: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    extra: dict[str, Tensor] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the state to one safetensors file, atomically."""
        tensors = {f"net/{name}": tensor for name, tensor in self.net.state_dict().items()}
        tensors |= {f"optimizer/{name}": tensor for name, tensor in state_tensors(self.optimizer, self.net).items()}
        tensors |= {f"extra/{name}": tensor for name, tensor in self.extra.items()}
        plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        header = {
            "spec": self.net.spec.model_dump_json(),
            "epoch": str(self.epoch),
            "curve": json.dumps(self.curve),
            "threads": str(torch.get_num_threads()),
        }
        write_atomically(path, lambda temporary: save_file(plain, temporary, metadata=header))

    @classmethod
    def build(cls, saved: Saved, config: Optimizer, device: torch.device) -> "TrainingState":
        """Build a state from the content of a file."""
        header, tensors = saved

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        net = RetrievalNet(ArchSpec.model_validate_json(header["spec"]))
        net.load_state_dict(part("net/"), strict=True)
        net = net.to(device).to(memory_format=torch.channels_last)
        optimizer = build_optimizer(net, config)
        load_state_tensors(optimizer, net, part("optimizer/"))
        return cls(net, optimizer, int(header["epoch"]), json.loads(header["curve"]), part("extra/"))


def read(path: Path) -> Saved:
    """Read a file that `TrainingState.save` wrote.

    Raises:
        SafetensorError: If the file is damaged.
    """
    with safe_open(path, framework="pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping


@dataclass(frozen=True)
class Checkpoints:
    """The saved states of one training, as files named by epoch.

    Attributes:
        folder: Folder of this training only; its name depends on params, inputs, code and library versions.
    """

    folder: Path

    def _generations(self) -> list[Path]:
        return sorted(self.folder.glob("epoch-*.safetensors"), reverse=True)

    def save(self, state: TrainingState) -> None:
        """Write a state and delete all but the newest `GENERATIONS`."""
        state.save(self.folder / f"epoch-{state.epoch:05d}.safetensors")
        for path in self._generations()[GENERATIONS:]:
            path.unlink()

    def restore(self, config: Optimizer, fabric: Fabric) -> TrainingState | None:
        """Return the newest readable state, the same on every device; None if there is none.

        The first device reads and broadcasts it: only that device saves states, and nodes need not share a folder.
        """
        saved, state = None, None
        for path in self._generations() if fabric.is_global_zero else ():
            try:
                saved = read(path)
                state = TrainingState.build(saved, config, fabric.device)
            except (SafetensorError, RuntimeError, ValueError, KeyError) as error:
                log.warning("%s cannot be read (%s); trying the state before it", path.name, error)
                saved = None
                continue
            log.info("resuming after epoch %d, from %s", state.epoch, path.name)
            before, now = saved[0].get("threads"), str(torch.get_num_threads())
            if fabric.device.type == "cpu" and before not in (None, now):
                log.warning("resuming with %s threads a training that had %s, so the last digits of its weights will "
                            "differ from those of an uninterrupted one", now, before)  # fmt: skip
            break
        saved = fabric.broadcast(saved)
        if state is None and saved is not None:
            state = TrainingState.build(saved, config, fabric.device)
        return state

    def clear(self) -> None:
        """Delete the saved states, once the result is written."""
        shutil.rmtree(self.folder, ignore_errors=True)
