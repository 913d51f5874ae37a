"""`python -m lorif_index` is the command `lorif`."""

from __future__ import annotations

from .cli import main

if __name__ == "__main__":
    main()
