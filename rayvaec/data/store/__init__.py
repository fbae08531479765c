"""Stores: manifest, opening, external stores, verification."""
