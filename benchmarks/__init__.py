"""Measurements of single claims: `python -m benchmarks.NAME`. They need some minutes and an idle machine."""
