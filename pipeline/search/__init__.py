"""Image search in a gallery: index, search page, re-ranking."""
