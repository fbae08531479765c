"""Analyses of scvi-tools' CondSCVI under its names."""
