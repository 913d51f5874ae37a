"""Codecs: what is kept of an example, and what rows of it mean; a file each, and a registry of their names."""
