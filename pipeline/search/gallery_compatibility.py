"""Compare two exported models on the test set: can a gallery be kept when the model changes?"""

from pathlib import Path

import numpy as np

from pipeline.config import Params
from pipeline.data.images import Images, data_root
from pipeline.data.manifest import Manifest
from pipeline.export.embed import Embeddings, embed
from pipeline.export.model import open_model
from pipeline.files import Files
from pipeline.retrieval.compatibility import Compatibility, compare
from pipeline.retrieval.evaluate import sides


def compatible(files: Files, params: Params, old: Path, new: Path) -> Compatibility:
    """Score two ONNX files of releases, and the new model's queries in the old model's gallery.

    Raises:
        FileNotFoundError: If stage `prepare` has not run.
        ReleaseError: If the SHA-256 of a file is not that of its release.
    """
    manifest = Manifest.read(files.manifest, data_root(files, params))
    indices = np.concatenate([manifest.indices("query"), manifest.indices("gallery")])

    def embed_test_set(path: Path) -> Embeddings:
        model = open_model(path)
        images = Images(manifest, model.metadata.image_size, None)  # no cache: its image size may be another
        return embed(model.session, images, indices, model.metadata.mean, model.metadata.std)

    protocol = params.data.protocol
    old_sides, new_sides = (sides(embed_test_set(path), manifest, "query", "gallery", protocol) for path in (old, new))
    return compare(protocol, old_sides, new_sides)
