"""Training: one loop, one state object, and what teacher and student add to it."""
