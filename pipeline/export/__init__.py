"""From a network to an ONNX file that can be trusted."""
