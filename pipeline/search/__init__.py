"""Galleries that can be searched: by a command, and by a page in the browser."""
