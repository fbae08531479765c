"""Kernels for GPUs, in torch."""
