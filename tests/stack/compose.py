"""Read docker/compose.yaml, so that its services can be started as processes.

Only the features that this file uses are supported; others are errors.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

VARIABLE = re.compile(r"\$(?:\$|\{(?P<name>\w+)(?::-(?P<default>[^}]*))?\})")
SUPPORTED = {"command", "depends_on", "entrypoint", "environment", "healthcheck", "profiles"}
IGNORED = {
    "build", "hostname", "image", "init", "logging", "ports", "restart", "secrets", "shm_size", "stop_grace_period",
    "volumes", "working_dir",
}  # fmt: skip
"""Keys of a service that do not matter for a process started in the checkout."""


@dataclass(frozen=True)
class Service:
    """One service as a program.

    Attributes:
        command: Entry point and arguments.
        environment: Variables in addition to inherited ones.
        health: Command with exit code 0 once the service works; may be empty.
        after: Services that must work before this one starts; they come earlier in the file.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str]
    health: tuple[str, ...]
    after: tuple[str, ...]


def services(path: Path, variables: Mapping[str, str]) -> dict[str, Service]:
    """Read all services without a profile.

    Raises:
        ValueError: If a service has an unsupported key, or comes before one of its dependencies.
    """
    declared = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))["services"]
    found: dict[str, Service] = {}
    for name, keys in declared.items():
        if "profiles" in keys:
            continue
        if unknown := set(keys) - SUPPORTED - IGNORED:
            raise ValueError(f"service {name} has unsupported keys: {', '.join(sorted(unknown))}")
        if later := set(keys.get("depends_on", {})) - set(found):
            raise ValueError(f"service {name} comes before its dependencies {', '.join(later)}")
        found[name] = _service(name, keys, variables)
    return found


def substitute(text: str, variables: Mapping[str, str]) -> str:
    """Substitute the variables in a text as Compose does."""

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
        tuple(substitute(str(word), variables) for word in [*keys.get("entrypoint", []), *keys["command"]]),
        {key: substitute(str(value), variables) for key, value in keys.get("environment", {}).items()},
        tuple(substitute(str(word), variables) for word in health[1:]),
        tuple(keys.get("depends_on", {})),
    )
