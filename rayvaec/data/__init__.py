"""Counts, registries, the sharded store and its loader."""
