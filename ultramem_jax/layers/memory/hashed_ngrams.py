"""Hashed n-grams: rows follow from the last few token ids alone, and no score is computed (Engram).

Engram (arXiv 2601.07372) reads K rows for the two, and K for the three tokens that end at a position, each
from a table of its own. Here the tables of a memory lie one behind the other in one, orders first, then
heads; each read is a block of its own, so that the readout sees all rows side by side. An order of one with
an exact table is a per-layer embedding (STEM, arXiv 2601.10639). The module is in `ngram_addresser`.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ultramem_jax.config.memory import MemoryConfig, MemorySite
from ultramem_jax.config.memory_kinds import ADDRESSERS
from ultramem_jax.config.memory_parts import (
    MAX_SLOTS,
    AddressConfig,
    MemoryInit,
    ModelContext,
    TableLayout,
    Window,
)
from ultramem_jax.errors import UserError, require
from ultramem_jax.ops.ngram_constants import MAX_ROWS, MIN_ROWS, head_sizes

_MOST_ORDER = 16
_MOST_HEADS = 256
"""Published are orders up to 3 and 8 heads; each order is a step of the compiled program."""
_GATE_POWER = 0.3
"""About E[σ(sign(g)·√|g|)²] for g ~ N(0, 1): 0.30. What a gate leaves of the values' variance."""


@ADDRESSERS.add("hashed_ngrams")
@dataclass(frozen=True)
class HashedNgrams(AddressConfig):
    """Reads a row per head and order, at the hash of the n tokens that end at a position."""

    kind: Literal["hashed_ngrams"] = "hashed_ngrams"
    min_order: int = 2
    """The shortest n-gram."""
    max_order: int = 3
    """n_max, the longest."""
    heads_per_order: int = 8
    """K: hashes of each n-gram, and tables for them."""
    rows_per_head: tuple[int, ...] = (65_536,)
    """The wished rows of a head's table, one number for all orders or one for each. A table gets the next
    prime that no other of the model has (section 2.2 of the paper; `ops.ngram_constants.head_sizes`)."""
    exact: bool = False
    """One row for each canonical id, and no hash: a per-layer embedding. For one order, 1, and one head."""
    num_canonical_ids: int = 0
    """V_c, ids that tokens are mapped to before they are hashed, by the buffer `canonical_ids`; training
    takes the map of its tokenizer (`data.canonical_ids`). 0: every token is its own, and there is no map."""
    pad_id: int = 0
    """The token that stands before the start of a sequence."""
    seed: int = 0
    """The seed of the hash's multipliers. N-gram memories of several names in one model need different ones;
    within a name, each memory has multipliers and primes of its own."""
    row_multiple: int = 1
    """The table's rows are rounded up to a multiple of it, so that the devices of a mesh divide them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "min_order", "heads_per_order", "row_multiple")
        self.at_least(0, "num_canonical_ids", "pad_id", "seed")
        self.require(
            self.min_order <= self.max_order <= _MOST_ORDER,
            "max_order",
            f"must be at least min_order = {self.min_order}, at most {_MOST_ORDER}",
        )
        self.require(self.heads_per_order <= _MOST_HEADS, "heads_per_order", f"must be at most {_MOST_HEADS}")
        self.require(
            len(self.rows_per_head) in (1, len(self.orders)),
            "rows_per_head",
            f"must be one number, or one for each of the {len(self.orders)} orders",
        )
        self.require(
            all(MIN_ROWS <= rows <= MAX_ROWS for rows in self.rows_per_head),
            "rows_per_head",
            f"must be in [{MIN_ROWS}, {MAX_ROWS}]",
        )
        self.require(
            not self.exact or self.rows_per_head == HashedNgrams.rows_per_head,
            "rows_per_head",
            "must be left out while exact is True: there is a row for each token",
        )
        self.require(
            not self.exact or (self.max_order == 1 and self.heads_per_order == 1),
            "exact",
            "must be False unless max_order and heads_per_order are 1: longer n-grams are too many",
        )

    @property
    def orders(self) -> tuple[int, ...]:
        """The lengths n of the n-grams."""
        return tuple(range(self.min_order, self.max_order + 1))

    @property
    def reads_per_token(self) -> int:
        """R = (n_max - n_min + 1)·K."""
        return len(self.orders) * self.heads_per_order

    @property
    def num_blocks(self) -> int:
        """R: every read is a block of its own."""
        return self.reads_per_token

    @property
    def reads_tokens(self) -> bool:
        """Nothing but tokens is read."""
        return True

    @property
    def reads_apart(self) -> bool:
        """All rows of a token lie side by side."""
        return True

    @property
    def weighs_reads(self) -> bool:
        """Nothing weighs a read."""
        return False

    @property
    def slots_hint(self) -> str:
        """The rounding of rows."""
        return " (address.row_multiple rounds them up)"

    @property
    def reads_in_words(self) -> str:
        """(orders)·K."""
        return f"{len(self.orders)}·{self.heads_per_order}"

    @property
    def own_slots(self) -> int:
        """Rows of the first memory; of an exact table 1, as they are the vocabulary's."""
        return 1 if self.exact else sum(self._sizes(1)[0])

    @property
    def _wished(self) -> tuple[int, ...]:
        """Wished rows of each order's heads."""
        return self.rows_per_head * (len(self.orders) if len(self.rows_per_head) == 1 else 1)

    def _sizes(self, num_memories: int) -> tuple[tuple[int, ...], ...]:
        try:
            return _head_sizes(self._wished, self.heads_per_order, num_memories)
        except ValueError as error:
            raise UserError(f"address.rows_per_head = {self.rows_per_head}: {error}") from None

    def check(self, memory: MemoryConfig) -> None:
        """Refuses tables that several memories read: each has hashes of its own."""
        memory.require(
            memory.table.sharing == "none", "table.sharing", "must be 'none': each memory has its own hash"
        )

    def check_beside(self, others: Sequence[AddressConfig]) -> None:
        """Refuses another n-gram memory with the same hash; exact tables hash nothing and never clash."""
        hashed = [other for other in others if isinstance(other, HashedNgrams) and not other.exact]
        same = not self.exact and any(other.seed == self.seed for other in hashed)
        self.require(not same, "seed", "must differ from that of another n-gram memory")

    def layout(self, memory: MemoryConfig, context: ModelContext) -> TableLayout:
        """Returns a table for each memory, its heads' tables one behind the other."""
        num_ids = self.num_canonical_ids or context.vocab_size
        memory.require(
            num_ids <= context.vocab_size,
            "address.num_canonical_ids",
            f"must be at most the vocabulary of {context.vocab_size}",
        )
        memory.require(
            self.pad_id < context.vocab_size,
            "address.pad_id",
            f"must be a token: below {context.vocab_size}",
        )
        count = len(context.starts)
        rows = (num_ids,) * count if self.exact else tuple(map(sum, self._sizes(count)))
        rows = tuple(-(-n // self.row_multiple) * self.row_multiple for n in rows)
        most = max(rows, default=0)
        memory.require(
            most <= MAX_SLOTS,
            "address.rows_per_head",
            f"a table of {most:,} rows, at most 2**31 - 2**26 = {MAX_SLOTS:,}: int32",
        )
        return TableLayout(rows, tuple(Window(i, 0, n) for i, n in enumerate(rows)))

    def head_rows(self, site: MemorySite) -> tuple[int, ...]:
        """Returns the rows of each of the R heads of a memory, orders first."""
        if self.exact:
            return (self.num_canonical_ids or site.context.vocab_size,)
        return self._sizes(len(site.context.starts))[site.index]

    def cache(self, site: MemorySite) -> dict[str, tuple[tuple[int, ...], str]]:
        """Returns the last n_max - 1 canonical ids."""
        return {"token_ids": ((self.max_order - 1,), "int32")} if self.max_order > 1 else {}

    def initial(self, site: MemorySite) -> MemoryInit:
        """Returns rows of N(0, 1/(2·L·0.3)): with `context_gate` the output's variance starts near 1/(2L).

        The paper does not say how tables start; this is UltraMem's principle, with what the gate leaves.
        """
        return MemoryInit(values_std=1 / math.sqrt(2 * site.context.num_layers * _GATE_POWER))

    def addresser(self, site: MemorySite, name: str | None = None) -> Any:
        """Returns the module."""
        from ultramem_jax.layers.memory.ngram_addresser import NgramAddresser

        return NgramAddresser(site, self, name=name)

    def with_token_map(self, canonical_ids: np.ndarray) -> "HashedNgrams":
        """Returns the config with the number of canonical ids of a tokenizer; none if each is its own."""
        its_own = (canonical_ids == np.arange(len(canonical_ids))).all()
        number = 0 if its_own else int(canonical_ids.max()) + 1
        self.require(
            self.num_canonical_ids in (0, number),
            "num_canonical_ids",
            f"must be 0, or the {number} of this run's tokenizer",
        )
        return dataclasses.replace(self, num_canonical_ids=number)

    def token_buffers(self, site: MemorySite, canonical_ids: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the map of tokens, (V,); ids that the tokenizer does not have count as the padding."""
        if not self.num_canonical_ids:
            return {}
        most = len(canonical_ids) - 1
        require(
            self.pad_id <= most,
            f"model.memories.{site.group}.address.pad_id",
            self.pad_id,
            f"must be a token, at most {most}",
        )
        mapped = np.full(site.context.vocab_size, canonical_ids[self.pad_id], np.int32)
        mapped[: len(canonical_ids)] = canonical_ids
        return {"canonical_ids": mapped}

    def near_slots(self, num_slots: float) -> "list[HashedNgrams]":
        """Returns rows per head in proportion, so that the first memory has about that many.

        Raises:
            UserError: an exact table, whose rows are the vocabulary's.
        """
        self.require(not self.exact, "exact", "must be False for a table whose rows are to be chosen")
        found, scale = self, num_slots / self.own_slots
        for _ in range(3):  # primes that heads have to themselves add to what is wished, least to many rows
            rows = (min(max(round(rows * scale), MIN_ROWS), MAX_ROWS) for rows in self.rows_per_head)
            found = dataclasses.replace(self, rows_per_head=tuple(rows))
            scale *= num_slots / found.own_slots
        return [found]

    def in_words(self) -> tuple[list[str], list[str]]:
        """Returns orders and rows."""
        rows = "/".join(f"{rows:,}" for rows in self.rows_per_head)
        orders = f"{self.min_order} to {self.max_order}" if len(self.orders) > 1 else str(self.max_order)
        return [f"n-grams of {orders}", "a row per token" if self.exact else f"{rows} rows a head"], []


@functools.lru_cache(maxsize=64)
def _head_sizes(wished: tuple[int, ...], heads: int, num_memories: int) -> tuple[tuple[int, ...], ...]:
    return head_sizes(wished, heads, num_memories)
