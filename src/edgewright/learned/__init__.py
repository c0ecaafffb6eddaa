"""What is learned by gradients, with PyTorch: the rounding of weights, and the weights of a quantized network."""
