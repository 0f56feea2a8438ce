"""Compare all compression methods at several targets and seeds: `python -m benchmarks.evidence`."""
