"""Convert a network to ONNX: normalised float images in, L2-normalised embeddings out.

The bytes depend on the weights and the code only. Exporter notes such as stack traces and local paths are removed.
"""

from typing import Any

import onnx
import torch
from torch import Tensor, nn

from pipeline.inference.session import INPUT, OUTPUT
from pipeline.models.resnet import RetrievalNet, convert


class Embedder(nn.Module):
    """A copy of a network without its classifier, followed by L2 normalisation."""

    def __init__(self, net: RetrievalNet) -> None:
        super().__init__()
        self.net = convert(net, net.spec.model_copy(update={"identities": 0, "projections": {}})).cpu()

    def forward(self, image: Tensor) -> Tensor:
        """Embed normalised images, (B, 3, H, W) -> (B, D).

        The formula is that of `l2_normalise`, whose `expand` would become a Shape and an Expand of the batch in the
        graph: OpenCV 4 cannot run them for more than one image.
        """
        embedding = self.net(image).embedding
        length = embedding.norm(dim=1, keepdim=True)
        return embedding / length.clamp_min(torch.finfo(embedding.dtype).eps)


def to_onnx(net: RetrievalNet, image_size: tuple[int, int], opset: int, batch: int | None = None) -> onnx.ModelProto:
    """Convert a network to an ONNX model.

    Args:
        net: Network; it is not modified.
        image_size: (height, width) of the input, pixels.
        opset: Version of the ONNX operator set.
        batch: Images in a call; None for any number.

    Raises:
        RuntimeError: If the exporter falls back to another operator set.
    """
    example = torch.zeros(batch or 2, 3, *image_size)  # the exporter treats a batch of 1 as a constant
    program = torch.onnx.export(
        Embedder(net).eval(),
        (example,),
        dynamo=True,
        external_data=False,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes={"image": {0: "batch"}} if batch is None else None,
        opset_version=opset,
        verbose=False,
    )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    model = program.model_proto
    versions = {entry.domain: entry.version for entry in model.opset_import}
    if versions != {"": opset}:
        raise RuntimeError(
            f"the exporter of torch {torch.__version__} wrote operator sets {versions} instead of `export.opset` "
            f"{opset}; set another `export.opset`"
        )
    _strip_notes(model)
    return model


def _strip_notes(message: Any) -> None:
    """Clear doc strings and metadata of a protobuf message recursively: they hold stack traces and local paths."""
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for child in [value] if hasattr(value, "ListFields") else value:
                _strip_notes(child)
