"""Triplet loss with student embeddings as anchors, and teacher embeddings as positives and negatives."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from pipeline.losses.registry import extra_loss


@extra_loss
def asymmetric_triplet(
    student: Tensor, teacher: Tensor, labels: Tensor, *, margin: Annotated[float, Field(ge=0, le=2)]
) -> Tensor:
    """Compute the batch-hard triplet loss on cosines between student anchors and teacher embeddings.

    An anchor's positives are the teacher embeddings of the same identity, that of the anchor's image included, so that
    student queries work with a gallery that the teacher has embedded.

    Source: Budnik and Avrithis, "Asymmetric Metric Learning for Knowledge Transfer", CVPR 2021, section 3.2.

    Args:
        student: (B, D), not necessarily normalised.
        teacher: (B, D), not necessarily normalised.
        labels: (L,) identities of the first L images, at least two different ones; the other images are left out.
        margin: By how much the smallest cosine with a positive should exceed the largest with a negative, in [0, 2].

    Returns:
        Scalar, the mean over the anchors.
    """
    student, teacher = student[: len(labels)], teacher[: len(labels)]
    cosines = functional.normalize(student.to(torch.float32)) @ functional.normalize(teacher.to(torch.float32)).T
    same = labels[:, None] == labels[None, :]
    positive = cosines.masked_fill(~same, torch.inf).amin(dim=1)
    negative = cosines.masked_fill(same, -torch.inf).amax(dim=1)
    return functional.relu(negative - positive + margin).mean()
