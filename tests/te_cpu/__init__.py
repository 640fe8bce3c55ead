"""Transformer Engine on a CPU, for tests: its own Python, above torch instead of its compiled extension (loader.py)."""
