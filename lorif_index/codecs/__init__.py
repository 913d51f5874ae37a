"""Rows: an example's gradients as factors, coordinates or both, and how they lie in a row."""
