"""Retraining with Prefect: the flow, its deployments, new data, and the dvc command."""
