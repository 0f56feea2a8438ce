"""What imports what, read from the sources: shared by the tests of the architecture and of dvc.yaml."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]


def sources(folder: str) -> list[Path]:
    """Python files below a folder of the repository."""
    return sorted((ROOT / folder).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Dotted names of all modules that a file imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: imports are absolute"
            # `from pipeline.losses import distill` imports a module, `from pipeline.files import Files` a name.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(module: str) -> str | None:
    """The room of the house that a module lies in: `data`, `ops`, `files` ... or `stages`; None for other people's."""
    top, *rest = module.split(".")
    if top == "stages":
        return "stages"
    return rest[0] if top == "pipeline" and rest else None


def rooms_of(path: Path) -> set[str]:
    """Rooms that a file imports from."""
    return {found for module in imported(path) if (found := room(module))}


def files_of(name: str) -> list[Path]:
    """Sources of a room: a folder or a single file."""
    folder = ROOT / "pipeline" / name
    return sources(f"pipeline/{name}") if folder.is_dir() else [folder.with_suffix(".py")]
