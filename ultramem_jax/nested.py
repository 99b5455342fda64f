"""Walks nested dicts, such as trees of variables and the state dicts that they are made of."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

Path: TypeAlias = tuple[str, ...]


def leaves(tree: Mapping[str, Any], path: Path = ()) -> list[tuple[Path, Any]]:
    """Returns what is in a nested dict and is no dict itself, each with the keys that lead to it."""
    found: list[tuple[Path, Any]] = []
    for name, value in tree.items():
        inner = (*path, name)
        found += leaves(value, inner) if isinstance(value, Mapping) else [(inner, value)]
    return found


def at(tree: Mapping[str, Any], path: Sequence[str]) -> Any:
    """Returns what the keys of a path lead to.

    Raises:
        KeyError: a key is not there.
    """
    found: Any = tree
    for name in path:
        found = found[name]
    return found


def put(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Puts a value where the keys of a path lead to; dicts on the way that are missing are made."""
    *modules, name = path
    for module in modules:
        tree = tree.setdefault(module, {})
    tree[name] = value
