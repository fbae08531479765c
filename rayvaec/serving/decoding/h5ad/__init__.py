"""h5ad request bodies, read in a sandboxed process."""
