"""MLflow's model registry: the promotion rule, publish, pull and rollback."""
