"""Reads which modules a file imports."""

import ast
import pathlib
from collections.abc import Iterator


def import_statements(path: pathlib.Path) -> Iterator[tuple[str, list[str]]]:
    """Yields every module that a file imports, wherever in it, and the names that are taken from it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import has no name to check"
            yield node.module, [alias.name for alias in node.names]


def imported_packages(path: pathlib.Path) -> set[str]:
    """Returns the top-level packages that a file imports."""
    return {module.partition(".")[0] for module, _ in import_statements(path)}
