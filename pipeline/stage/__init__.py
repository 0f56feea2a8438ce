"""How a DVC stage runs: params.yaml, presets, exit codes, and what a stage reports."""
