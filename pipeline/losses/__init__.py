"""Losses, one kind in each file."""
