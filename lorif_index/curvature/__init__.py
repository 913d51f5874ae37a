"""Curvature: what is learnt from a sample and shared by all rows: directions, the inverse, the sketch."""
