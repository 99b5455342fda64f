"""Provides an immutable dict, for configs that hold other configs by name."""

from typing import NoReturn, TypeVar

V = TypeVar("V")


class FrozenMapping(dict[str, V]):
    """Maps names to values and cannot be changed. It can be hashed if its values can."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> "tuple[type[FrozenMapping[V]], tuple[dict[str, V]]]":
        return FrozenMapping, (dict(self),)

    def _immutable(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("configs cannot be changed: dataclasses.replace makes another one")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _immutable
