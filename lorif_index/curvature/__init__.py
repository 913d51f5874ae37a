"""Fit: what is learnt from a sample and shared by all rows: curvature, sketch, eigencodes."""
