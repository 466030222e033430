"""Model and objective captured as a graph, and the black boxes in it."""
