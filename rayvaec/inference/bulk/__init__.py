"""Inference over a whole store as resumable Ray tasks."""
