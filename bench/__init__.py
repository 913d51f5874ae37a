"""Benchmarks: each is a claim with its own command, and keeps its result as JSON."""
