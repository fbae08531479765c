"""Posterior-predictive checks of a model on a store's held-out cells, and their report."""
