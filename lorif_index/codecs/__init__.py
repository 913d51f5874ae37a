"""Codecs: what is kept of an example, a row of bytes, and how such rows are scored."""
