"""Export networks to ONNX, and check that the files reproduce them."""
