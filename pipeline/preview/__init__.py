"""`smaller-student preview`: what would be trained on, and what it would cost, before anything trains."""
