"""Chooses algorithms by platform, in one place: change a line here to compute in another way.

Every choice computes the same. Selections agree to the bit, sums up to the rounding of their order.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

from ultramem_jax.platforms import Platform, platform


@dataclass(frozen=True)
class Algorithms:
    """Names the algorithm of every operation that has several."""

    selection: Literal["heap", "ranks"]
    """How the k largest of a row are found (`ops.topk`). `heap`: `jax.lax.top_k` of tiles. `ranks`: by
    counting which values are larger; `jax.lax.top_k` sorts whole rows on accelerators."""
    picks: Literal["gather", "compare"]
    """How entries are taken at chosen positions of a short axis (`ops.selection`): `gather`, or `compare`
    with all positions, for TPUs, which gather single words one after the other."""
    candidates: Literal["rows", "products"]
    """How the scores of chosen keys, and their gradients, are computed (`ops.key_scores`). `rows`: from the
    chosen keys, gathered. `products`: from matrix products of all keys."""
    sums_by_row: Literal["scatter", "products"]
    """How reads of the same row are summed (`ops.row_sums`). `scatter`: in their order, one by one; on an
    accelerator that takes atomic additions. `products`: by matrix products of groups."""
    sort: Literal["words", "pairs"]
    """How integers are sorted with their positions (`ops.sorting`): as single words, digit by digit, or as
    pairs, which takes no gathers between the digits."""
    svd: Literal["library", "small"]
    """How Tucker cores are decomposed (`ops.small_svd`): by the library's solver, or in plain JAX."""
    loops: Literal["as_needed", "fixed"]
    """How many chunks of rows an update goes through: as many as there are rows, or always all. A GPU asks
    the host before each pass of a loop whose length it does not know."""
    chunk_values: int
    """Temporary values of a chunk of tokens (`ops.chunks`)."""


_BY_PLATFORM: dict[Platform, Algorithms] = {
    # 16 MB of float32 stay in the cache, and are paged in once.
    "cpu": Algorithms("heap", "gather", "rows", "scatter", "words", "library", "as_needed", 1 << 22),
    # A loop over chunks costs a GPU a few launches for each pass. 1 GB of float32 is a hundredth of its
    # memory.
    "gpu": Algorithms("ranks", "gather", "products", "products", "pairs", "small", "fixed", 1 << 28),
    "tpu": Algorithms("ranks", "compare", "products", "products", "pairs", "small", "as_needed", 1 << 27),
}


_CHANGES: ContextVar[dict[str, Any]] = ContextVar("changes", default={})  # noqa: B039


def algorithms() -> Algorithms:
    """Returns the algorithms of the platform that is being traced for, with the changes of `choosing`."""
    return dataclasses.replace(_BY_PLATFORM[platform()], **_CHANGES.get())


@contextlib.contextmanager
def choosing(**fields: Any) -> Iterator[None]:
    """Makes functions that are traced within it, and for the first time, use other algorithms.

    Args:
        **fields: fields of `Algorithms`.
    """
    token = _CHANGES.set(_CHANGES.get() | fields)
    try:
        yield
    finally:
        _CHANGES.reset(token)
