"""Build: an index is made."""
