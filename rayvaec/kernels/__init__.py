"""Performance-critical kernels, each with a plain reference implementation."""
