"""What shrinks a network: compactors, resetting, budgets, folding, surgery."""
