"""Ray Train: trainer, scaling, failures, the function that workers run."""
