"""Request bodies: from bytes to checked cells."""
