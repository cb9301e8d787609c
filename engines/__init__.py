"""ONNX model to something that runs: one module a runtime."""
