"""Measurements behind the claims of the README: `python -m benchmarks.NAME`. They need minutes and an idle machine."""
