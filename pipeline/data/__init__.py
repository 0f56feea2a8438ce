"""Images and who is on them: sources, manifest, decoded cache, augmentation, sampling."""
