"""Provides a dict that cannot be changed, for configs that hold others by name."""

from typing import Any, NoReturn


class FrozenDict(dict[str, Any]):
    """Maps names to values, cannot be changed, and can be hashed as its values can."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> Any:
        return FrozenDict, (dict(self),)

    def _immutable(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("configs cannot be changed: dataclasses.replace makes another one")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _immutable
