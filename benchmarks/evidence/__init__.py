"""Every method at every target with every seed, and what they show together: `python -m benchmarks.evidence`."""
