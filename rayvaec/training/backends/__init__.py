"""A training step on CPUs and on CUDA devices."""
