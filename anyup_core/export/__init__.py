"""Exported models: the ONNX graph and what feeds it."""
