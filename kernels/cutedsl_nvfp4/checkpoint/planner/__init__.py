"""Memory of a model on GPUs: weights, caches, the longest context."""
