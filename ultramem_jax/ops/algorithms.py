"""Chooses algorithms by platform, in one place: change a line here to compute in another way.

Every choice computes the same. Top-k agrees to the bit, sums up to the rounding of their order and terms. So
keys whose scores differ by less than that may be chosen differently.
"""

import contextlib
import dataclasses
import importlib.util
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
    layouts: Literal["narrow", "wide"]
    """How large arrays of a few numbers for each read lie: with the numbers side by side, or, for TPUs, with
    the reads along the last axis, which is padded to 128."""
    experts: Literal["blocks", "ragged", "groups"]
    """How a Mixture of Experts is computed (`layers.experts`). With tokamax, a GPU has `ragged`, too."""
    loops: Literal["as_needed", "fixed"]
    """How many chunks of rows an update on one device goes through: as many as there are rows, or always all.
    A GPU asks the host before each pass of a loop whose length it does not know. Owners of split tables
    always go through as many as they own."""
    chunk_values: int
    """Temporary values of a chunk of tokens (`ops.chunks`)."""


_CPU = Algorithms(
    selection="heap",
    picks="gather",
    candidates="rows",
    sums_by_row="scatter",
    sort="words",
    svd="library",
    layouts="narrow",
    experts="blocks",
    loops="as_needed",
    # 16 MB of float32 stay in the cache, and are paged in once.
    chunk_values=1 << 22,
)
_GPU = Algorithms(
    selection="ranks",
    picks="gather",
    candidates="products",
    sums_by_row="products",
    sort="pairs",
    svd="small",
    layouts="narrow",
    experts="groups",
    loops="fixed",
    # Each pass of a loop over chunks costs a few launches. 1 GB of float32 is a hundredth of the memory.
    chunk_values=1 << 28,
)
_TPU = dataclasses.replace(
    _GPU,
    picks="compare",
    layouts="wide",
    experts="ragged",
    loops="as_needed",
    # 512 MB of float32: a TPU v5e has 16 GB.
    chunk_values=1 << 27,
)
_BY_PLATFORM: dict[Platform, Algorithms] = {"cpu": _CPU, "gpu": _GPU, "tpu": _TPU}

_CHANGES: ContextVar[dict[str, Any]] = ContextVar("changes", default={})  # noqa: B039


def algorithms() -> Algorithms:
    """Returns the algorithms of the platform that is being traced for, with the changes of `choosing`."""
    chosen = _BY_PLATFORM[platform()]
    if platform() == "gpu" and has_tokamax():
        chosen = dataclasses.replace(chosen, experts="ragged")
    return dataclasses.replace(chosen, **_CHANGES.get())


def has_tokamax() -> bool:
    """Tells whether tokamax is installed, whose ragged products are fast on GPU and TPU."""
    return importlib.util.find_spec("tokamax") is not None


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
