"""A network as one ONNX file: float images in, embeddings of length 1 out.

Equal weights of one commit give equal bytes: nothing in a file tells when, where or by whom it was made.
"""

from typing import Any

import onnx
import torch
from torch import Tensor, nn

from pipeline.inference.session import INPUT, OUTPUT
from pipeline.models.head import l2_normalise
from pipeline.models.resnet import RetrievalNet, convert

IR_VERSION = 10
"""Of the file format; ONNX Runtime from 1.19 (2024) reads it."""


class Embedder(nn.Module):
    """What is exported: a network without its classifier, and its embedding scaled to length 1.

    Args:
        net: Network, left as it is.
    """

    def __init__(self, net: RetrievalNet) -> None:
        super().__init__()
        self.net = convert(net, net.spec.model_copy(update={"identities": 0})).cpu()

    def forward(self, image: Tensor) -> Tensor:
        """Embed normalised images, (B, 3, H, W) -> (B, D)."""
        return l2_normalise(self.net(image).embedding)


def to_onnx(net: RetrievalNet, image_size: tuple[int, int], opset: int) -> onnx.ModelProto:
    """Translate a network.

    Args:
        net: Network in torch.
        image_size: Height and width of the input, pixels; the batch may have any size.
        opset: Operator set.

    Raises:
        RuntimeError: If the exporter falls back to another operator set.
    """
    example = torch.zeros(2, 3, *image_size)  # a batch of 1 would be taken for a constant
    program = torch.onnx.export(
        Embedder(net).eval(),
        (example,),
        dynamo=True,
        external_data=False,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes={"image": {0: "batch"}},
        opset_version=opset,
        verbose=False,
    )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    model = program.model_proto
    used = {entry.domain: entry.version for entry in model.opset_import}
    if used != {"": opset}:
        raise RuntimeError(
            f"`export.opset` {opset} became {used}; set it to one that torch {torch.__version__} can write"
        )
    model.ir_version = IR_VERSION
    _strip(model)
    return model


def _strip(message: Any) -> None:
    """Take the exporter's notes out of a protobuf message, at any depth: stack traces with local paths, class names."""
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for child in [value] if hasattr(value, "ListFields") else value:
                _strip(child)
