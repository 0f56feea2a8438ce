"""Embeddings and how well they retrieve."""
