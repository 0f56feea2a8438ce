"""Two exported models on this checkout's test set: may the gallery stay?"""

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
    """Score both, and the new one's queries in the old one's gallery.

    Args:
        files: Of the checkout; stage `prepare` has run.
        params: Of the checkout.
        old: ONNX file of a release.
        new: Likewise.

    Raises:
        ReleaseError: If a file is not what was written.
    """
    manifest = Manifest.read(files.manifest, data_root(files, params))
    rows = np.concatenate([manifest.indices("query"), manifest.indices("gallery")])

    def embedded(path: Path) -> Embeddings:
        model = open_model(path)
        images = Images(manifest, model.metadata.image_size, None)  # the sizes may differ: from the files themselves
        return embed(model.session, images, rows, model.metadata.mean, model.metadata.std)

    protocol = params.data.protocol
    return compare(protocol, *(sides(embedded(path), manifest, "query", "gallery", protocol) for path in (old, new)))
