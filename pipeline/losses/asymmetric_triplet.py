"""Triplets whose anchor is the student's and whose positives and negatives are the teacher's."""

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
    """Batch-hard triplet loss on cosines between student anchors and teacher embeddings.

    An anchor's positives are the teacher's embeddings of the same identity, its own image among them, so that student
    queries find what they should in a gallery of the teacher.

    Source: Budnik and Avrithis, "Asymmetric Metric Learning for Knowledge Transfer", CVPR 2021, section 3.2.

    Args:
        student: (B, D), of any length.
        teacher: (B, D), of the frozen teacher.
        labels: (B,), identities; at least two different ones.
        margin: Cosine by which the farthest positive must be nearer than the nearest negative.

    Returns:
        Mean over the anchors, a scalar.
    """
    cosines = functional.normalize(student.to(torch.float32)) @ functional.normalize(teacher.to(torch.float32)).T
    same = labels[:, None] == labels[None, :]
    positive = cosines.masked_fill(~same, torch.inf).amin(dim=1)
    negative = cosines.masked_fill(same, -torch.inf).amax(dim=1)
    return functional.relu(negative - positive + margin).mean()
