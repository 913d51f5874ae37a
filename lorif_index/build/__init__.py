"""Build: an index is made, grows, shrinks, is merged and mended."""
