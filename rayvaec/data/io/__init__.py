"""Bytes of local files and object stores."""
