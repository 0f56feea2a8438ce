"""Errors of the model registry."""


class RegistryError(RuntimeError):
    """The registry lacks a requested version or alias, or was changed by hand."""

    exit_code = 3
