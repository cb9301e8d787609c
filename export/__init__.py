"""Keras model to ONNX model: networks, weights, conversion, clean-ups and checks."""
