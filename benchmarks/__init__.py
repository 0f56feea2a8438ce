"""Measurements of single promises: `python -m benchmarks.NAME`. They need minutes and an idle machine."""
