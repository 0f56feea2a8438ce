"""Labelled images: data set layouts, manifest, decoded cache, augmentation and P x K sampling."""
