"""Collectives: process group, gradients, barrier."""
