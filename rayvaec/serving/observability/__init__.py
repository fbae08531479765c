"""Metrics of the endpoint."""
