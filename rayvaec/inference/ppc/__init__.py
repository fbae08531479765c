"""Posterior predictive checks on held-out cells, and their report."""
