"""Storage: files that are complete or absent, the manifest that names them, and who may write."""
