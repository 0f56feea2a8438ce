"""The embedding head and the identity classifier."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.models.spec import LAST, ArchSpec


class GeneralisedMean(nn.Module):
    """Global pooling by a generalised mean with a learnable exponent, that of fast-reid's `GeneralizedMeanPoolingP`.

    Source: Radenovic et al., "Fine-Tuning CNN Image Retrieval with No Human Annotation", TPAMI 2019, section 3.2.
    """

    EPS = 1e-6
    """Smallest value that enters the mean; so an always-zero channel has this mean, not 0."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.full((1,), 3.0))

    def forward(self, features: Tensor) -> Tensor:
        """Pool feature maps, (B, C, H, W) -> (B, C)."""
        with torch.autocast(features.device.type, enabled=False):  # powers need 32 bits
            features = features.to(self.p.dtype)
            return features.clamp_min(self.EPS).pow(self.p).mean(dim=(2, 3)).pow(1 / self.p)


class EmbeddingHead(nn.Module):
    """Global pooling, and the parts that the spec names: batch norm, ReLU, linear map without bias, batch norm.

    Embeddings are compared by cosine.
    """

    def __init__(self, spec: ArchSpec) -> None:
        super().__init__()
        channels, dim = spec.widths[LAST], spec.embedding_dim
        self.pool = GeneralisedMean() if spec.pool == "gem" else None
        self.bn1 = nn.BatchNorm1d(channels) if spec.head.startswith("bn-relu") else None
        self.fc = nn.Linear(channels, dim, bias=False) if spec.has_linear else None
        self.bn2 = nn.BatchNorm1d(dim, bias=spec.neck_bias) if spec.head != "none" else None
        self.non_negative = spec.head.endswith("relu")

    def forward(self, features: Tensor) -> Tensor:
        """Embed feature maps, (B, C, H, W) -> (B, D)."""
        embedding = features.mean(dim=(2, 3)) if self.pool is None else cast(Tensor, self.pool(features))
        if self.bn1 is not None:
            embedding = functional.relu(self.bn1(embedding))
        if self.fc is not None:
            embedding = self.fc(embedding)
        if self.bn2 is not None:
            embedding = self.bn2(embedding)
        return functional.relu(embedding) if self.non_negative else embedding


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
