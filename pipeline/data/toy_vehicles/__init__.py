"""The default data set: rendered toy vehicles, in the layout of VeRi-776."""
