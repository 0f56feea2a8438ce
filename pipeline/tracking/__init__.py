"""MLflow tracking: run records on disk, and their upload."""
