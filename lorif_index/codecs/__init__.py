"""Codecs: what is kept of an example, one class in one file for each kind, and the registry that names them."""
