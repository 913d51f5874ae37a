"""Linear algebra: streamed subspaces, projections, random samples."""
