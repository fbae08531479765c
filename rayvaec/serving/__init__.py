"""The sampling endpoint on Ray Serve."""
