"""What docker/compose.yaml declares, so that the same services can be started without containers.

Only what that file uses is understood; anything else is an error and not a surprise.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

VARIABLE = re.compile(r"\$(?:\$|\{(?P<name>\w+)(?::-(?P<default>[^}]*))?\})")
KNOWN = {
    "build", "command", "depends_on", "entrypoint", "environment", "healthcheck", "image", "init", "logging", "ports",
    "profiles", "restart", "secrets", "shm_size", "stop_grace_period", "volumes", "working_dir",
}  # fmt: skip
"""Keys of a service; build, image, init, logging, ports, restart, secrets, shm_size and volumes are Docker's matter."""


class ComposeError(ValueError):
    """The file says something that is not understood."""

    exit_code = 2


@dataclass(frozen=True)
class Service:
    """One program.

    Attributes:
        name: Of the service.
        command: What is started, the entry point first.
        environment: Variables beside those that are there.
        health: Command that ends with 0 once it works; empty where there is none.
        grace: Seconds that it gets to end by itself.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    health: tuple[str, ...]
    grace: float


def services(path: Path, variables: Mapping[str, str]) -> list[Service]:
    """All services that belong to no profile, each after those that it waits for.

    Args:
        path: compose.yaml.
        variables: What stands for `${NAME}`; defaults are those of the file.

    Raises:
        ComposeError: If the file uses something else, or services wait for one another.
    """
    content = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    declared = {name: said for name, said in content["services"].items() if "profiles" not in said}
    return [_service(name, declared[name], variables) for name in _in_order(declared)]


def filled(text: str, variables: Mapping[str, str]) -> str:
    """A text of the file with its variables replaced."""

    def value(found: re.Match[str]) -> str:
        if found[0] == "$$":
            return "$"
        if (said := variables.get(found["name"], "")) or (said := found["default"]) is not None:
            return said
        raise ComposeError(f"`{found[0]}` has no value and no default")

    return VARIABLE.sub(value, text)


def _in_order(declared: Mapping[str, Any]) -> Iterator[str]:
    left = dict(declared)
    while left:
        ready = [name for name, said in left.items() if not set(said.get("depends_on", {})) & set(left)]
        if not ready:
            raise ComposeError(f"services wait for one another: {', '.join(left)}")
        yield from ready
        for name in ready:
            del left[name]


def _service(name: str, said: Mapping[str, Any], variables: Mapping[str, str]) -> Service:
    if unknown := set(said) - KNOWN:
        raise ComposeError(f"service {name} has keys that are not understood: {', '.join(sorted(unknown))}")
    words = [*said.get("entrypoint", []), *said["command"]]
    health = said.get("healthcheck", {}).get("test", ["CMD"])
    if not isinstance(said["command"], list) or health[0] != "CMD":
        raise ComposeError(f"service {name}: commands and health checks are lists of words")
    grace = said.get("stop_grace_period", "10s")
    if not re.fullmatch(r"\d+s", grace):
        raise ComposeError(f"service {name}: stop_grace_period {grace} is not in seconds")
    return Service(
        name,
        tuple(filled(str(word), variables) for word in words),
        {key: filled(str(value), variables) for key, value in said.get("environment", {}).items()},
        tuple(filled(str(word), variables) for word in health[1:]),
        float(grace[:-1]),
    )
