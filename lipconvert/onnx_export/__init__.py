"""Networks as ONNX graphs: how each stage is written, and the graph."""
