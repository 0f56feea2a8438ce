"""How long the exported files take."""
