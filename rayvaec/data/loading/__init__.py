"""Minibatches: sampler, shuffle buffer, loader."""
