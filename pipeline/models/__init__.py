"""Architectures as data, the networks they describe, and their cost."""
