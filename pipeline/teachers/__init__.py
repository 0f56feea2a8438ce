"""Teachers that were trained elsewhere: state dicts of other toolkits, and ONNX files of any architecture."""
