"""AnnData files: the one reader of their structure, annotation and counts, and its checks."""
