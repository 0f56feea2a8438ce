"""Scripts that make the pages and pictures of this folder."""
