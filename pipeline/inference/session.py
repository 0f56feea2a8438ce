"""ONNX Runtime sessions; import this module before `onnxruntime`, because it turns the telemetry off."""

import os
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read only once, when the library is loaded

from onnxruntime import GraphOptimizationLevel, InferenceSession, SessionOptions
from onnxruntime.capi import onnxruntime_pybind11_state as errors

from pipeline.runtime import available_threads

__all__ = ["INPUT", "OUTPUT", "RUNTIME_ERRORS", "InferenceSession", "open_session"]

INPUT, OUTPUT = "image", "embedding"
"""Names of the input and the output of every exported file."""

RUNTIME_ERRORS = (
    *(errors.Fail, errors.InvalidArgument, errors.InvalidGraph, errors.NotImplemented, errors.RuntimeException),
)
"""What ONNX Runtime raises for a file that it cannot run."""


def open_session(
    model: Path | bytes, threads: int = 0, profile: Path | None = None, optimised: Path | None = None
) -> InferenceSession:
    """Load an ONNX model on the CPU, with all graph optimisations.

    Args:
        model: Path of a file, or its content.
        threads: Intra-op threads; 0 for all that this process may use.
        profile: Prefix of the path of a profile to write; `end_profiling` returns the whole path.
        optimised: Path to write the optimised graph to; it is valid on this machine only.

    Raises:
        FileNotFoundError: If the file does not exist.
    """
    if isinstance(model, Path) and not model.is_file():
        raise FileNotFoundError(f"{model} is missing; run `dvc repro` or `dvc pull` first")
    options = SessionOptions()
    options.intra_op_num_threads = threads or available_threads()
    options.inter_op_num_threads = 1
    # Without this, content that starts like ORT's own format is loaded as such, and not as the ONNX that was checked.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
        options.log_severity_level = 3  # silences the warning that the file is valid on this machine only
    options.graph_optimization_level = GraphOptimizationLevel.ORT_ENABLE_ALL
    return InferenceSession(model, options, providers=["CPUExecutionProvider"])
