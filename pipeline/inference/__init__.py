"""ONNX Runtime, and what a network of any widths costs it."""
