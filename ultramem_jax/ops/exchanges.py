"""Names each exchange between devices, so that a compiled program says what a collective is for."""

import contextlib
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager

import jax

_SCOPE = re.compile(r"exchange\(([^()]+)\)")


def named_exchange(purpose: str) -> AbstractContextManager[None]:
    """Returns a scope whose collectives carry a purpose in their names.

    Args:
        purpose: one of `ultramem_jax.config.exchange_purposes`. It has no parentheses, slashes or colons,
            because these separate the parts of such a name.
    """
    return jax.named_scope(f"exchange({purpose})")


def purposes_of(op_name: str) -> tuple[str, ...]:
    """Returns the purposes that `named_exchange` gave to an operation, each once.

    Args:
        op_name: JAX's path to the operation, as in HLO text. If the compiler joined several collectives, it
            joins their paths by colons.

    Returns:
        An empty tuple if the operation, or one of the joined ones, belongs to no exchange.
    """
    found = [_SCOPE.findall(path) for path in op_name.split(":")]
    return tuple(dict.fromkeys(purposes[-1] for purposes in found)) if all(found) else ()


@contextlib.contextmanager
def compiled_with_names() -> Iterator[None]:
    """Makes JAX's compilation cache also distinguish programs by the names of their operations.

    Otherwise a program may come from the cache with the names that an earlier version of the code gave it.
    """
    flag = "jax_compilation_cache_include_metadata_in_key"
    before = jax.config.values[flag]
    jax.config.update(flag, True)
    try:
        yield
    finally:
        jax.config.update(flag, before)
