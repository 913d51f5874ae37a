"""What makes parts of the docs: run from the repository's root, `python -m scripts.NAME`."""
