"""Read docker/compose.yaml, so that its services can be started as processes.

Only what that file uses is understood; anything else is an error.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

VARIABLE = re.compile(r"\$(?:\$|\{(?P<name>\w+)(?::-(?P<default>[^}]*))?\})")
USED = {"command", "depends_on", "entrypoint", "environment", "healthcheck", "profiles"}
OF_DOCKER = {
    "build", "hostname", "image", "init", "logging", "ports", "restart", "secrets", "shm_size", "stop_grace_period",
    "volumes", "working_dir",
}  # fmt: skip
"""Keys of a service that mean nothing to a process started in the checkout."""


@dataclass(frozen=True)
class Service:
    """One program.

    Attributes:
        command: What is started, the entry point first.
        environment: Variables beside those that are inherited.
        health: Command that ends with 0 once the service works; empty where there is none.
        after: Services that must work before this one is started; they stand before it in the file.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str]
    health: tuple[str, ...]
    after: tuple[str, ...]


def services(path: Path, variables: Mapping[str, str]) -> dict[str, Service]:
    """Read all services that belong to no profile.

    Raises:
        ValueError: If one has a key that is not understood, or comes before one that it waits for.
    """
    declared = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))["services"]
    found: dict[str, Service] = {}
    for name, keys in declared.items():
        if "profiles" in keys:
            continue
        if unknown := set(keys) - USED - OF_DOCKER:
            raise ValueError(f"service {name} has keys that are not understood: {', '.join(sorted(unknown))}")
        if later := set(keys.get("depends_on", {})) - set(found):
            raise ValueError(f"service {name} stands before {', '.join(later)}, which it waits for")
        found[name] = _service(name, keys, variables)
    return found


def filled(text: str, variables: Mapping[str, str]) -> str:
    """Replace the variables in a text as Compose does."""

    def value(found: re.Match[str]) -> str:
        if found[0] == "$$":
            return "$"
        if (known := variables.get(found["name"], "")) or (known := found["default"]) is not None:
            return known
        raise ValueError(f"`{found[0]}` has no value and no default")

    return VARIABLE.sub(value, text)


def _service(name: str, keys: Mapping[str, Any], variables: Mapping[str, str]) -> Service:
    health = keys.get("healthcheck", {}).get("test", ["CMD"])
    if not isinstance(keys["command"], list) or health[0] != "CMD":
        raise ValueError(f"service {name}: commands and health checks are lists of words")
    return Service(
        tuple(filled(str(word), variables) for word in [*keys.get("entrypoint", []), *keys["command"]]),
        {key: filled(str(value), variables) for key, value in keys.get("environment", {}).items()},
        tuple(filled(str(word), variables) for word in health[1:]),
        tuple(keys.get("depends_on", {})),
    )
