"""Plain PyTorch, on any device: the reference."""
