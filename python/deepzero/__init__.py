"""Zeroth-order training of neural networks from function values alone."""
