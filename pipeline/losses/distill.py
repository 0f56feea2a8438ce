"""Distillation losses between the outputs of student and teacher."""

import torch
from torch import Tensor
from torch.nn import functional


def soft_targets(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Compute the KL divergence between softened class probabilities, times the squared temperature.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, section 2.

    Args:
        student: (B, identities) logits.
        teacher: (B, identities) logits.
        temperature: Divisor of the logits.

    Returns:
        Scalar, the mean over the batch.
    """
    log_student = functional.log_softmax(student.to(torch.float32) / temperature, dim=1)
    log_teacher = functional.log_softmax(teacher.to(torch.float32) / temperature, dim=1)
    return functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def features(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute the L2 distance between the pooled features of student and teacher.

    Source: Xie et al., "Towards a Smaller Student", CVPR 2023.

    Args:
        student: (B, C).
        teacher: (B, C).
        mask: (C,) bool, channels to compare; None for all. Channels that are being pruned must be left out, or their
            growing distance would dominate the loss.

    Returns:
        Scalar, the mean over the batch.
    """
    difference = student.to(torch.float32) - teacher.to(torch.float32)
    return torch.linalg.vector_norm(difference if mask is None else difference * mask, dim=1).mean()


def embeddings(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the cosine distance between the embeddings of student and teacher.

    Source: Budnik and Avrithis, "Asymmetric Metric Learning for Knowledge Transfer", CVPR 2021 (regression).

    Args:
        student: (B, D), not necessarily normalised.
        teacher: (B, D), not necessarily normalised.

    Returns:
        Scalar, the mean over the batch.
    """
    return (1 - functional.cosine_similarity(student.to(torch.float32), teacher.to(torch.float32))).mean()
