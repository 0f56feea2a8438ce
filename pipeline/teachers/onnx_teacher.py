"""A teacher that is an ONNX file: it embeds the images that a student is trained with, by ONNX Runtime."""

from pathlib import Path

import numpy as np
import onnx
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from pipeline.files import write_atomically
from pipeline.inference.session import INPUT, OUTPUT, open_session
from pipeline.models.resnet import Output, TeacherNet
from pipeline.teachers import onnx_cost

FILE, CLASSIFIER = "teacher.onnx", "classifier.safetensors"


class OnnxTeacher(TeacherNet):
    """Embeddings by an ONNX file, and cosines to the training identities.

    Args:
        content: A file with the input and output of this project; see `onnx_rewriting.standardised`.
        classifier: (identities, D), normalised; None before they are known.

    Attributes:
        content: The file.
        batch: Images in a call; None for any number.
    """

    classifier: Tensor | None

    def __init__(self, content: bytes, classifier: Tensor | None = None) -> None:
        super().__init__()
        self.content = content
        self.register_buffer("classifier", classifier)
        self._session = open_session(content)
        batch, *_ = self._session.get_inputs()[0].shape
        self.batch: int | None = batch if isinstance(batch, int) else None

    def forward(self, images: Tensor) -> Output:
        """Embed normalised images (B, 3, H, W), on any device."""
        pixels = images.detach().to("cpu", torch.float32).contiguous().numpy()
        size = self.batch or len(pixels)
        parts = []
        for start in range(0, len(pixels), size):
            part = pixels[start : start + size]
            filled = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
            parts.append(self._session.run([OUTPUT], {INPUT: filled})[0][: len(part)])
        embedding = torch.from_numpy(np.concatenate(parts)).to(images.device)
        logits = (
            None if self.classifier is None else functional.linear(functional.normalize(embedding), self.classifier)
        )
        return Output(embedding, logits)

    @property
    def embedding_dim(self) -> int:
        return int(self._session.get_outputs()[0].shape[1])

    def count_params(self) -> int:
        return onnx_cost.params(self.model())

    def count_macs(self, image_size: tuple[int, int]) -> int | None:
        return onnx_cost.macs(self.model())

    def model(self) -> onnx.ModelProto:
        """Return the file as a model."""
        return onnx.load_from_string(self.content)

    def save(self, folder: Path) -> None:
        """Write teacher.onnx and classifier.safetensors.

        Raises:
            ValueError: If there is no classifier.
        """
        if self.classifier is None:
            raise ValueError("a teacher is saved with its classifier")
        tensors = {"weight": self.classifier.cpu().contiguous()}
        write_atomically(folder / CLASSIFIER, lambda temporary: save_file(tensors, temporary))
        write_atomically(folder / FILE, lambda temporary: temporary.write_bytes(self.content))

    @classmethod
    def load(cls, folder: Path) -> "OnnxTeacher":
        """Read the result of `save`."""
        return cls((folder / FILE).read_bytes(), load_file(folder / CLASSIFIER)["weight"])
