"""PyTorch: densities, networks, objectives, the training loop, evaluation."""
