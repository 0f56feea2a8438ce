"""Refuse to build a wheel: the packages are called `pipeline` and `stages`, names that other projects use, too."""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class EditableOnly(BuildHookInterface):  # type: ignore[type-arg]
    """Allow editable installs only."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Stop a standard build.

        Raises:
            RuntimeError: With the remedy.
        """
        if version != "editable":
            raise RuntimeError(
                "smaller-student runs from a checkout only: clone it, then `make setup` or `pip install -e .`"
            )
