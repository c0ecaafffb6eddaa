"""PyTorch → ONNX: the registry of networks, their weights, and a clean graph equal to the model."""
