"""From images of identities seen by cameras to a small, verified retrieval network."""
