"""Capture: where projected gradients come from, a model or the user, in one form."""
