"""The default data set: toy vehicles rendered in the layout of VeRi-776."""
