"""Plain PyTorch, any floating-point dtype: what each op means."""
