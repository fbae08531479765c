"""Sampling endpoint on Ray Serve."""
