"""Training: the one training loop, its optimiser and saved state, and the losses of the teacher."""
