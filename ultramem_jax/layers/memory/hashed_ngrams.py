"""Configures hashed n-grams (Engram): rows depend only on the last few token ids, and nothing is scored.

Engram (arXiv 2601.07372) reads K rows for the two tokens that end at a position, and K for the three tokens,
each from a table of its own. Here the tables of a memory are concatenated to one, sorted by order and then by
head. Each read is a block of its own, so the readout gets all rows, concatenated. An order of one with an
exact table is a per-layer embedding (STEM, arXiv 2601.10639). The hash is in `ops.ngram_hash`, the Flax
module in `ngram_addresser`.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from ultramem_jax.config.memory import MemoryConfig, MemorySite
from ultramem_jax.config.memory_kinds import ADDRESSERS
from ultramem_jax.config.memory_parts import (
    MAX_SLOTS,
    AddressConfig,
    Head,
    MemoryInit,
    ModelContext,
    TableLayout,
    Window,
)
from ultramem_jax.errors import UserError, require
from ultramem_jax.ops.ngram_constants import MAX_ROWS, MIN_ROWS, head_sizes

if TYPE_CHECKING:
    from flax import linen as nn

_MOST_ORDER = 16
"""Largest order: each order is a step of the compiled program. Published orders are up to 3."""
_MOST_HEADS = 256
"""Largest number of heads per order. Published models have 8."""
_GATE_POWER = 0.3
"""Part of the values' variance that a gate leaves: E[σ(sign(g)·√|g|)²] for g ~ N(0, 1), about 0.30."""


@ADDRESSERS.add("hashed_ngrams")
@dataclass(frozen=True)
class HashedNgrams(AddressConfig):
    """Reads a row per head and order, at the hash of the n tokens that end at a position (Engram)."""

    kind: Literal["hashed_ngrams"] = "hashed_ngrams"
    min_order: int = 2
    """Length of the shortest n-grams."""
    max_order: int = 3
    """n_max, length of the longest n-grams."""
    heads_per_order: int = 8
    """K, number of hashes of each n-gram; each hash has a table."""
    rows_per_head: tuple[int, ...] = (65_536,)
    """Wished number of rows of a head's table, one number for all orders or one for each. A table gets the
    next prime that no other table of the model has (section 2.2 of the paper;
    `ops.ngram_constants.head_sizes`)."""
    exact: bool = False
    """Whether the table has one row for each canonical id instead of a hash: a per-layer embedding. Needs one
    order, 1, and one head."""
    num_canonical_ids: int = 0
    """V_c, number of ids that tokens are mapped to before they are hashed, by the buffer `canonical_ids`.
    Training takes the map of its tokenizer (`data.canonical_ids`). 0: tokens are not mapped."""
    pad_id: int = 0
    """Token that pads the start of a sequence."""
    seed: int = 0
    """Seed of the hash's multipliers. N-gram memories of several names in one model need
    different seeds, but for exact tables, which hash nothing.
    Memories of one name share the seed, and each has multipliers and primes of its own."""
    row_multiple: int = 1
    """The number of rows of a table is rounded up to a multiple of this, so that a mesh can split them."""

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
        """Returns the lengths n of the n-grams."""
        return tuple(range(self.min_order, self.max_order + 1))

    @property
    def reads_per_token(self) -> int:
        """Returns the number of reads of a token, R = (n_max - n_min + 1)·K."""
        return len(self.orders) * self.heads_per_order

    @property
    def num_blocks(self) -> int:
        """Returns R, because every read is a block of its own."""
        return self.reads_per_token

    @property
    def reads_tokens(self) -> bool:
        """Returns True: the addresser reads token ids, and nothing else."""
        return True

    @property
    def reads_apart(self) -> bool:
        """Returns True: the rows of a token are concatenated, not summed."""
        return True

    @property
    def weighs_reads(self) -> bool:
        """Returns False: reads have no weights."""
        return False

    @property
    def slots_hint(self) -> str:
        """Returns a hint for error messages: the field that rounds the rows up, in parentheses."""
        return " (address.row_multiple rounds them up)"

    @property
    def heads(self) -> tuple[Head, ...]:
        """Returns the orders of n-grams; each has the reads of its K hashes."""
        return tuple(Head("single tokens" if n == 1 else f"{n}-grams", n) for n in self.orders)

    @property
    def reads_in_words(self) -> str:
        """Returns the reads of a token in words: number of orders times K."""
        return f"{len(self.orders)}·{self.heads_per_order}"

    @property
    def own_slots(self) -> int:
        """Returns the rows of the first memory, or 1 for an exact table, whose rows are the vocabulary's."""
        return 1 if self.exact else sum(self._sizes(1)[0])

    @property
    def _wished(self) -> tuple[int, ...]:
        """Returns the wished rows of each order's heads."""
        return self.rows_per_head * (len(self.orders) if len(self.rows_per_head) == 1 else 1)

    def _sizes(self, num_memories: int) -> tuple[tuple[int, ...], ...]:
        try:
            return _head_sizes(self._wished, self.heads_per_order, num_memories)
        except ValueError as error:
            raise UserError(f"address.rows_per_head = {self.rows_per_head}: {error}") from None

    def check(self, memory: MemoryConfig) -> None:
        """Refuses tables that several memories share, because each memory has hashes of its own.

        Raises:
            UserError: `table.sharing` is not `none`.
        """
        memory.require(
            memory.table.sharing == "none", "table.sharing", "must be 'none': each memory has its own hash"
        )

    def check_beside(self, others: Sequence[AddressConfig]) -> None:
        """Refuses another n-gram memory with the same hash; exact tables hash nothing and never clash.

        Raises:
            UserError: another n-gram memory has the same seed.
        """
        hashed = [other for other in others if isinstance(other, HashedNgrams) and not other.exact]
        same = not self.exact and any(other.seed == self.seed for other in hashed)
        self.require(not same, "seed", "must differ from that of another n-gram memory")

    def layout(self, memory: MemoryConfig, context: ModelContext) -> TableLayout:
        """Returns a table for each memory, which concatenates its heads' tables.

        Raises:
            UserError: there are more canonical ids than tokens, `pad_id` is no token, or a table is too large
                for int32.
        """
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
        """Returns the number of rows of each of the R heads of a memory, sorted by order and then by head."""
        if self.exact:
            return (self.num_canonical_ids or site.context.vocab_size,)
        return self._sizes(len(site.context.starts))[site.index]

    def cache(self, site: MemorySite) -> dict[str, tuple[tuple[int, ...], str]]:
        """Returns what decoding keeps: the last n_max - 1 canonical ids."""
        return {"token_ids": ((self.max_order - 1,), "int32")} if self.max_order > 1 else {}

    def initial(self, site: MemorySite) -> MemoryInit:
        """Returns the initialisation of rows, N(0, 1/(2·L·0.3)).

        With `context_gate` the output's variance then starts near 1/(2L). The paper does not say how tables
        start. This is UltraMem's principle, with the part of the variance that the gate leaves.
        """
        return MemoryInit(values_std=1 / math.sqrt(2 * site.context.num_layers * _GATE_POWER))

    def addresser(self, site: MemorySite, name: str | None = None) -> "nn.Module":
        """Returns the Flax module of this addresser, `NgramAddresser`."""
        from ultramem_jax.layers.memory.ngram_addresser import NgramAddresser

        return NgramAddresser(site, self, name=name)

    def with_token_map(self, canonical_ids: np.ndarray) -> "HashedNgrams":
        """Returns the config with the number of canonical ids of a tokenizer, or 0 if it maps no token.

        Args:
            canonical_ids: canonical id of each of the tokenizer's ids.

        Raises:
            UserError: the config has another number already.
        """
        its_own = (canonical_ids == np.arange(len(canonical_ids))).all()
        number = 0 if its_own else int(canonical_ids.max()) + 1
        self.require(
            self.num_canonical_ids in (0, number),
            "num_canonical_ids",
            f"must be 0, or the {number} of this run's tokenizer",
        )
        return dataclasses.replace(self, num_canonical_ids=number)

    def token_buffers(self, site: MemorySite, canonical_ids: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the map from tokens to canonical ids, (V,) int32, or nothing if tokens are not mapped.

        Ids that the tokenizer does not have are mapped to the canonical id of the padding.

        Raises:
            UserError: the tokenizer does not have `pad_id`.
        """
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

    def index_buffers(self, site: MemorySite) -> dict[str, int | None]:
        """Returns the map from tokens to canonical ids, if tokens are mapped."""
        return {"canonical_ids": self.num_canonical_ids} if self.num_canonical_ids else {}

    def near_slots(self, num_slots: float) -> "list[HashedNgrams]":
        """Returns the config with rows per head scaled so that the first memory has about `num_slots` rows.

        Raises:
            UserError: the table is exact, so its rows are the vocabulary's.
        """
        self.require(not self.exact, "exact", "must be False for a table whose rows are to be chosen")
        found, scale = self, num_slots / self.own_slots
        # Distinct primes add rows to the wished ones, in proportion least to large tables. So it takes a few
        # rounds.
        for _ in range(3):
            rows = (min(max(round(rows * scale), MIN_ROWS), MAX_ROWS) for rows in self.rows_per_head)
            found = dataclasses.replace(self, rows_per_head=tuple(rows))
            scale *= num_slots / found.own_slots
        return [found]

    def in_words(self) -> tuple[list[str], list[str]]:
        """Describes orders and rows in words."""
        rows = "/".join(f"{rows:,}" for rows in self.rows_per_head)
        orders = f"{self.min_order} to {self.max_order}" if len(self.orders) > 1 else str(self.max_order)
        return [f"n-grams of {orders}", "a row per token" if self.exact else f"{rows} rows a head"], []


@functools.lru_cache(maxsize=64)
def _head_sizes(wished: tuple[int, ...], heads: int, num_memories: int) -> tuple[tuple[int, ...], ...]:
    return head_sizes(wished, heads, num_memories)
