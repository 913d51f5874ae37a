"""Life: a finished index changed: examples added, removed, compacted, fits renewed, indexes merged, damage repaired."""
