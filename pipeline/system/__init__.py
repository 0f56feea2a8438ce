"""Git, locks and processes."""
