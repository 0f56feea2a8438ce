"""ONNX Runtime: sessions, latency, memory, and a latency model over widths."""
