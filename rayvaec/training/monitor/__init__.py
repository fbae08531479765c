"""Progress of a run: console, curves, experiment trackers."""
