"""Embeddings and their retrieval scores."""
