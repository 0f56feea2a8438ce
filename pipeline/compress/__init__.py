"""Compression of a network while it learns: compactors, masks, budgets, folding, surgery, and the baselines."""
