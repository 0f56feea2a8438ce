"""ONNX Runtime: whoever imports it imports this first, which turns its telemetry off."""

import os
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read once, when the library is loaded

from onnxruntime import GraphOptimizationLevel, InferenceSession, SessionOptions

from pipeline.runtime import available_threads

__all__ = ["INPUT", "OUTPUT", "InferenceSession", "open_session"]

INPUT, OUTPUT = "image", "embedding"
"""Names of the one input and the one output of every exported file."""


def open_session(
    model: Path | bytes, threads: int = 0, profile: Path | None = None, optimised: Path | None = None
) -> InferenceSession:
    """Load an ONNX model on the CPU, with all of the graph's optimisations.

    Args:
        model: The file, or its content.
        threads: Intra-op threads; 0 for all that this process may use.
        profile: Start of the path of a profile to write; `end_profiling` tells the whole.
        optimised: Where to write the graph as it is run, for this machine alone.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    if isinstance(model, Path) and not model.is_file():
        raise FileNotFoundError(f"{model} is missing; run `dvc repro` or `dvc pull` first")
    options = SessionOptions()
    options.intra_op_num_threads = threads or available_threads()
    options.inter_op_num_threads = 1
    # Else content that begins as the runtime's own format is loaded as that, and what was looked through is not run.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
        options.log_severity_level = 3  # else it warns that the file is for this machine alone
    options.graph_optimization_level = GraphOptimizationLevel.ORT_ENABLE_ALL
    return InferenceSession(model, options, providers=["CPUExecutionProvider"])
