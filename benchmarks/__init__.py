"""Measurements that the README quotes: `python -m benchmarks.NAME`. They need minutes and an idle machine."""
