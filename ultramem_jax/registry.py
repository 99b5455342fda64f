"""Finds the class of a kind by its name, as configs write it."""

import importlib
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from ultramem_jax.errors import unknown

T = TypeVar("T")


class Registry(Generic[T]):
    """Holds the classes of one role by the names of their kinds.

    The registry knows in which module each kind of the library is defined, and imports the module when the
    kind is first requested. So users of a registry import no concrete kind, and imports stay one-way. Code
    that defines another kind adds it with `add`.
    """

    def __init__(self, what: str, built_in: Mapping[str, str]):
        """Makes a registry.

        Args:
            what: the role, as messages name it.
            built_in: kind -> name of the module that adds it.
        """
        self._what, self._modules = what, dict(built_in)
        self._found: dict[str, type[T]] = {}

    def add(self, kind: str) -> Callable[[type[T]], type[T]]:
        """Returns the class decorator that adds a class under a name.

        Raises:
            ValueError: the decorator finds that another class has the name.
        """

        def decorate(cls: type[T]) -> type[T]:
            theirs = self._modules.get(kind, cls.__module__)
            if kind in self._found or theirs != cls.__module__:
                taken = self._found[kind].__qualname__ if kind in self._found else theirs
                raise ValueError(f"{self._what} {kind!r} is taken by {taken}")
            self._found[kind] = cls
            return cls

        return decorate

    def remove(self, kind: str) -> None:
        """Removes a kind, for tests that add one."""
        del self._found[kind]

    def __getitem__(self, kind: str) -> type[T]:
        """Returns the class of a kind.

        Raises:
            UserError: unknown kind; the message names the nearest one and lists all.
        """
        if kind not in self._found and kind in self._modules:
            importlib.import_module(self._modules[kind])
        if kind not in self._found:
            raise unknown(self._what, str(kind), self.kinds())
        return self._found[kind]

    def kinds(self) -> tuple[str, ...]:
        """Returns the names of all kinds."""
        return tuple(dict.fromkeys([*self._modules, *self._found]))
