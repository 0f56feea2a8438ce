"""Train, compress, export and track image-retrieval (re-identification) networks."""
