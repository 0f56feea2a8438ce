"""The registry of additional distillation losses, by their names in `student.distill.extra_losses`.

A new loss is one file in this folder with a function under the decorator `extra_loss`. The function's keyword-only
parameters are its settings in params.yaml. Nothing else has to be edited.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, create_model
from torch import Tensor

import pipeline.losses
from pipeline.config.section import Section


@dataclass(frozen=True)
class ExtraLoss:
    """A registered loss.

    Attributes:
        function: Takes the student's embeddings (B, D), the teacher's (B, D), identities (B,) and, as keywords, the
            settings; returns a scalar, the mean over the batch.
        settings: Model of its section of params.yaml: `weight` and the function's keyword-only parameters.
    """

    function: Callable[..., Tensor]
    settings: type[Section]

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor, settings: Mapping[str, float]) -> Tensor:
        """Compute the weighted loss of a batch."""
        keywords = {name: value for name, value in settings.items() if name != "weight"}
        return settings["weight"] * self.function(student, teacher, labels, **keywords)


_LOSSES: dict[str, ExtraLoss] = {}


def extra_loss(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Register a function, under its name, as a loss for `student.distill.extra_losses`."""
    fields: dict[str, Any] = {"weight": (Annotated[float, Field(gt=0, le=1000)], ...)}
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            fields[parameter.name] = (parameter.annotation, ...)
    _LOSSES[function.__name__] = ExtraLoss(function, create_model(function.__name__, __base__=Section, **fields))
    return function


def extra_losses() -> Mapping[str, ExtraLoss]:
    """Import all modules of this folder, and return the registered losses by name."""
    for module in pkgutil.iter_modules(pipeline.losses.__path__):
        importlib.import_module(f"{pipeline.losses.__name__}.{module.name}")
    return _LOSSES
