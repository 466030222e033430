"""The reference: the definition of each op in plain PyTorch, for any floating-point dtype."""
