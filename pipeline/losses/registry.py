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
        function: Takes the student's embeddings (B, D), the teacher's (B, D), identities (L,) of the first L images (of
            all, unless `student.batch.unlabelled` adds others) and, as keywords, the settings; returns a scalar, the
            mean over the batch.
        settings: Model of its section of params.yaml: `weight` and the function's keyword-only parameters.
    """

    function: Callable[..., Tensor]
    settings: type[Section]

    def bind(self, settings: Mapping[str, Any]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Return the weighted loss of a batch; settings without a value have their default."""
        values = self.settings.model_validate(settings).model_dump()
        weight: float = values.pop("weight")
        return lambda student, teacher, labels: weight * self.function(student, teacher, labels, **values)


_LOSSES: dict[str, ExtraLoss] = {}

RESERVED = {
    *("loss", "identity", "triplet", "kl", "feature", "embedding"),
    *("epoch", "validation_map", "macs_reduction", "params_reduction", "latency_reduction", "target_reduction"),
    *("masked_rows", "norm_of_masked_rows", "norm_of_other_rows"),
}
"""Names of the built-in losses and of other curves."""


def extra_loss(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Register a function, under its name, as a loss for `student.distill.extra_losses`.

    Raises:
        TypeError: If the name is taken, or a setting is not keyword-only or has no type.
    """
    name, here = function.__name__, f"the loss `{function.__name__}` in {function.__module__}"
    if name in RESERVED or name in _LOSSES:
        raise TypeError(f"{here} has the name of another loss or curve; rename it")
    fields: dict[str, Any] = {"weight": (Annotated[float, Field(gt=0, le=1000)], ...)}
    parameters = list(inspect.signature(function, eval_str=True).parameters.values())
    if [parameter.kind for parameter in parameters[:3]] != [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 3:
        raise TypeError(f"{here} must take the student's embeddings, the teacher's and the identities")
    for parameter in parameters[3:]:
        if parameter.name in fields:
            raise TypeError(f"{here} must not have a setting `weight`, since each loss has one")
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY or parameter.annotation is inspect.Parameter.empty:
            raise TypeError(
                f"the setting `{parameter.name}` of {here} must be keyword-only (after `*`) and have a type"
            )
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        fields[parameter.name] = (parameter.annotation, default)
    _LOSSES[name] = ExtraLoss(function, create_model(name, __base__=Section, **fields))
    return function


def extra_losses() -> Mapping[str, ExtraLoss]:
    """Import all modules of this folder, and return the registered losses by name, sorted."""
    for module in pkgutil.iter_modules(pipeline.losses.__path__):
        importlib.import_module(f"{pipeline.losses.__name__}.{module.name}")
    return dict(sorted(_LOSSES.items()))
