"""What a student takes over from its teacher."""

import torch
from torch import Tensor
from torch.nn import functional


def soft_targets(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL divergence between softened predictions, times the square of the temperature.

    Source: Hinton et al., 2015, section 2.

    Args:
        student: (B, identities), logits.
        teacher: (B, identities), logits of the frozen teacher.
        temperature: Divisor of the logits.

    Returns:
        Mean over the batch, a scalar.
    """
    log_student = functional.log_softmax(student.to(torch.float32) / temperature, dim=1)
    log_teacher = functional.log_softmax(teacher.to(torch.float32) / temperature, dim=1)
    return functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def features(student: Tensor, teacher: Tensor, compared: Tensor | None = None) -> Tensor:
    """L2 distance between the pooled features of student and teacher.

    Source: Xie et al., "Towards a Smaller Student", CVPR 2023.

    Args:
        student: (B, C).
        teacher: (B, C), of the frozen teacher.
        compared: (C,) bool, which channels are: those on their way out would outweigh the others; None for all.

    Returns:
        Mean over the batch, a scalar.
    """
    difference = student.to(torch.float32) - teacher.to(torch.float32)
    return torch.linalg.vector_norm(difference if compared is None else difference * compared, dim=1).mean()


def embeddings(student: Tensor, teacher: Tensor) -> Tensor:
    """Cosine distance between the embeddings of student and teacher.

    Source: Budnik and Avrithis, "Asymmetric Metric Learning for Knowledge Transfer", CVPR 2021 (regression).

    Args:
        student: (B, D), of any length.
        teacher: (B, D), of the frozen teacher.

    Returns:
        Mean over the batch, a scalar.
    """
    return (1 - functional.cosine_similarity(student.to(torch.float32), teacher.to(torch.float32))).mean()
