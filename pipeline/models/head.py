"""From a feature map to an embedding, and from an embedding to identities."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class EmbeddingHead(nn.Module):
    """Global average pooling, batch norm, ReLU, linear map without bias, batch norm.

    Source: the public code of Xie et al., CVPR 2023. Embeddings are compared by cosine.

    Args:
        channels: Channels of the feature map.
        embedding_dim: Length of the embedding.
    """

    def __init__(self, channels: int, embedding_dim: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm1d(channels)
        self.fc = nn.Linear(channels, embedding_dim, bias=False)
        self.bn2 = nn.BatchNorm1d(embedding_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Embed feature maps, (B, C, H, W) -> (B, D)."""
        pooled = features.mean(dim=(2, 3))
        return self.bn2(self.fc(functional.relu(self.bn1(pooled))))


class Classifier(nn.Linear):
    """Scores of an embedding for each training identity.

    Args:
        embedding_dim: Length of the embedding.
        identities: Number of training identities.
        cosine: Whether to return cosines (both sides L2-normalised) or inner products.
    """

    def __init__(self, embedding_dim: int, identities: int, cosine: bool) -> None:
        super().__init__(embedding_dim, identities, bias=False)
        self.cosine = cosine
        if cosine:
            nn.init.kaiming_normal_(self.weight)
        else:
            nn.init.normal_(self.weight, std=0.001)

    def forward(self, embedding: Tensor) -> Tensor:
        """Score embeddings, (B, D) -> (B, identities)."""
        if not self.cosine:
            return super().forward(embedding)
        with torch.autocast(embedding.device.type, enabled=False):  # half precision cannot tell near cosines apart
            unit = functional.normalize(embedding.to(self.weight.dtype))
            return functional.linear(unit, functional.normalize(self.weight))


def freeze_norms(module: nn.Module) -> None:
    """Keep the statistics of all batch norms as they are, until `train` is called on it."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            norm.eval()


def l2_normalise(embedding: Tensor) -> Tensor:
    """Scale rows to length 1; a row of zeros stays zero."""
    return functional.normalize(embedding, eps=torch.finfo(embedding.dtype).eps)
