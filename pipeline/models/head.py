"""The embedding head and the identity classifier."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class EmbeddingHead(nn.Module):
    """Global average pooling, batch norm, ReLU, linear map without bias, batch norm.

    Embeddings are compared by cosine. Source: the public code of Xie et al., CVPR 2023.
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
    """Linear classifier over the training identities, without bias.

    Args:
        cosine: Return cosines (embedding and weights L2-normalised) instead of inner products.
    """

    def __init__(self, embedding_dim: int, identities: int, cosine: bool) -> None:
        super().__init__(embedding_dim, identities, bias=False)
        self.cosine = cosine
        if cosine:
            nn.init.kaiming_normal_(self.weight)
        else:
            nn.init.normal_(self.weight, std=0.001)

    def forward(self, embedding: Tensor) -> Tensor:
        """Compute logits, (B, D) -> (B, identities)."""
        if not self.cosine:
            return super().forward(embedding)
        with torch.autocast(embedding.device.type, enabled=False):  # 16 bits are too coarse for cosines near 1
            unit = functional.normalize(embedding.to(self.weight.dtype))
            return functional.linear(unit, functional.normalize(self.weight))


def freeze_norms(module: nn.Module) -> None:
    """Freeze the running statistics of all batch norms, until `module.train()` is called again."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            norm.eval()


def l2_normalise(embedding: Tensor) -> Tensor:
    """Scale embeddings (B, D) to length 1; an embedding of zeros stays zero."""
    return functional.normalize(embedding, eps=torch.finfo(embedding.dtype).eps)
