"""AnnData's h5ad files as bodies: read in a process that can do nothing else, written in memory."""
