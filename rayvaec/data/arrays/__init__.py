"""Sharded one-dimensional Zarr arrays."""
