"""Middleware: authentication, limits, load shedding, errors."""
