"""The networks: architecture as data, residual blocks with compactor slots, cost."""
