"""Configures product keys: m cells of a grid of keys per head, by PKM's sums or UltraMem's Tucker cores.

`ProductKeys` has a field for every difference between PKM, UltraMem, UltraMemV2, Memory+ and PEER, among them
Tucker decomposed query-key retrieval (TDQKR), Multi-Core Scoring (MCS) and Implicit Value Expansion (IVE).
Their named constructors are in `presets.families`. The Flax module is in `product_key_retrieval`. It is
imported when it is first used, because counting parameters needs no JAX. The letters are those of the axis
legend in `ultramem_jax`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ultramem_jax.accounting.model import DTYPE_BYTES
from ultramem_jax.config.memory import MemoryConfig, MemorySite
from ultramem_jax.config.memory_kinds import ADDRESSERS
from ultramem_jax.config.memory_parts import (
    MAX_SLOTS,
    AddressConfig,
    Head,
    MemoryInit,
    ModelContext,
    Parameter,
    Stage,
    TableLayout,
    Window,
)

if TYPE_CHECKING:
    import jax
    from flax import linen as nn

    from ultramem_jax.ops.served_keys import ServedKeys

_MOST = {
    "query_conv_width": (256, "each tap is a step of the compiled program"),
    "tucker_rank": (32, "each of its r² products is a step of the compiled program"),
    "expansion": (1024, "each block has a projector of its own"),
}
"""Largest values of fields, and why. Published models have width 4, ranks of 2 to 4, and 4 to 16 blocks."""


@ADDRESSERS.add("product_keys")
@dataclass(frozen=True)
class ProductKeys(AddressConfig):
    """Finds m of n² slots per head by the scores of n row keys and n column keys; defaults are UltraMem's."""

    kind: Literal["product_keys"] = "product_keys"
    num_keys: int = 128
    """n, keys per side of the physical grid; a memory adds n² slots to the model (`TableConfig.sharing`)."""
    top_m: int = 16
    """m, values read per head and token."""
    num_heads: int = 2
    """H, number of retrieval heads; their reads are summed."""
    key_dim: int = 64
    """d_k, width of a query and of a key, per side."""
    softmax: bool = False
    """Whether scores pass through a softmax over the m reads of a head. UltraMem's change 1 removes it."""
    share_query: bool = True
    """UltraMem's change 3: all heads use one query."""
    share_keys: bool = False
    """Whether all heads have the same keys (PEER)."""
    norm_query: bool = True
    """UltraMem's change 5, "query/key LN": an RMS norm of queries over d_k, with gain."""
    norm_keys: bool = True
    """UltraMem's change 5, "query/key LN": an RMS norm of keys over d_k, with gain."""
    expansion: int = 4
    """UltraMem's change 6, Implicit Value Expansion (IVE): E virtual blocks per table, a square number. 1 is
    off."""
    shuffle: Literal["keyed", "explicit", "none"] = "keyed"
    """How Implicit Value Expansion permutes virtual addresses. `keyed` computes a bijection on the fly, if
    there is something to gain: E > 1 or a shared table. `explicit` reads a stored permutation of E·n²
    entries, random at first, for imported weights. `none` leaves the addresses as they are."""
    shuffle_seed: int = 0
    """Seed of the permutation; each memory of a model adds its own index."""
    tucker_rank: int = 2
    """UltraMem's change 7, Tucker decomposed query-key retrieval (TDQKR): r, rank of the Tucker core. 0 is
    off: row and column scores are added, as in PKM."""
    rank_keys: Literal["split", "full"] = "split"
    """How ranks share the key's width. `split`: the d_k dimensions are split into r groups, one per rank (the
    paper). `full`: every rank has keys of full width d_k, and all ranks share the query (the authors'
    code)."""
    query_per_rank: bool = False
    """With `full` rank keys: a query of width d_k for every rank instead of a shared one (UltraMemV2)."""
    num_cores: int = 2
    """UltraMem's change 8, Multi-Core Scoring (MCS): h cores, one score per slice of d_v/h. 1 is off."""
    core_loss_weight: float = 1e-3
    """α, weight of the auxiliary loss on the core's singular values (paper, section 3). 0 is off."""
    core_loss_margin: float = 0.15
    """τ, below which the auxiliary loss pushes the singular values λ_i, i >= 2."""
    balance_loss_weight: float = 0.0
    """β, weight of the loss that spreads the candidates of a micro-batch over the keys of a side
    (UltraMemV2). 0 is off."""
    init: Literal["paper", "reference", "pkm", "v2"] = "paper"
    """UltraMem's change 9, the initialisation. `paper`: output variance starts at 1/(2L) (without softmax,
    whose weights are smaller). `reference`: as in the authors' code of UltraMem. `pkm`: as in Product-Key
    Memory. `v2`: as in UltraMemV2."""
    query_conv_width: int = 4
    """UltraMem's change 11: width of the causal depthwise convolution before the query projection. 0 is
    off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "num_keys", "top_m", "num_heads", "key_dim", "num_cores", "expansion")
        self.at_least(0, "tucker_rank", "query_conv_width", "shuffle_seed")
        self.at_least(0, "core_loss_weight", "core_loss_margin", "balance_loss_weight")
        for name, (most, why) in _MOST.items():
            self.require(getattr(self, name) <= most, name, f"must be at most {most}: {why}")
        self.require(
            math.isqrt(self.expansion) ** 2 == self.expansion,
            "expansion",
            "must be a square: 1, 4, 9, 16, ...",
        )
        self.require(
            self.num_cores == 1 or self.tucker_rank >= 1,
            "num_cores",
            "must be 1 while tucker_rank is 0: the cores are Tucker cores",
        )
        self.require(
            self.tucker_rank < 2 or self.rank_keys == "full" or self.key_dim % self.tucker_rank == 0,
            "tucker_rank",
            f"must divide key_dim = {self.key_dim} while rank_keys is 'split'",
        )
        self.require(
            not self.query_per_rank or (self.tucker_rank >= 1 and self.rank_keys == "full"),
            "query_per_rank",
            "must be False unless tucker_rank is 1 or more and rank_keys is 'full'",
        )
        self.require(
            not (self.share_keys and self.share_query) or self.num_heads == 1 or self.tucker_rank > 0,
            "share_keys",
            "must be False while share_query is True and tucker_rank 0: all heads would read the same",
        )

    @property
    def reads_per_token(self) -> int:
        """Returns the number of reads of a token, R = H·m."""
        return self.num_heads * self.top_m

    @property
    def num_blocks(self) -> int:
        """Returns E, the number of virtual blocks."""
        return self.expansion

    @property
    def weights_per_read(self) -> int:
        """Returns h, the number of cores: one weight for each slice of a row."""
        return self.num_cores

    @property
    def num_ranks(self) -> int:
        """Returns the number of score vectors per side: r, or 1 without a Tucker core."""
        return max(self.tucker_rank, 1)

    @property
    def num_queries(self) -> int:
        """Returns the number of queries of width d_k per side: 1 if shared, else H; times r if per rank."""
        return (1 if self.share_query else self.num_heads) * (self.tucker_rank if self.query_per_rank else 1)

    @property
    def num_key_sets(self) -> int:
        """Returns the number of sets of keys per side: one if the heads share them, else one per head."""
        return 1 if self.share_keys else self.num_heads

    @property
    def rank_key_dim(self) -> int:
        """Returns the width of the part of a key that one rank scores with."""
        return self.key_dim // self.num_ranks if self.rank_keys == "split" else self.key_dim

    def check(self, memory: MemoryConfig) -> None:
        """Refuses tables that are too large.

        Tables of rings and blocks depend on the number of memories, so `layout` checks them.

        Raises:
            UserError: a table, or its virtual addresses, do not fit, or `top_m` exceeds the candidates.
        """
        if memory.table.sharing in ("none", "all"):
            self._layout(memory, 1)

    def layout(self, memory: MemoryConfig, context: ModelContext) -> TableLayout:
        """Returns the tables, and each memory's window: the largest square in its share.

        This is as in the authors' code.

        Raises:
            UserError: a table, or its virtual addresses, do not fit, `top_m` exceeds the candidates, or the
                share ratio does not cut the memories into equal groups.
        """
        return self._layout(memory, len(context.starts))

    def _layout(self, memory: MemoryConfig, num_memories: int) -> TableLayout:
        own, table = self.num_keys**2, memory.table
        side, slots = self.num_keys, (own,) * num_memories
        firsts = (0,) * num_memories
        if table.sharing == "all":
            slots = slots[:1]
        elif table.sharing != "none":
            whole = max(num_memories, 1) * own
            slots = (whole,)[:num_memories]
            if table.sharing == "ring":
                side = int((whole * table.share_ratio) ** 0.5)
                firsts = tuple(i * own for i in range(num_memories))
            else:
                # A ratio like 1/3 has a rounding error as a decimal number.
                group = max(round(table.share_ratio * num_memories), 1)
                exact = math.isclose(group, table.share_ratio * num_memories, abs_tol=1e-3)
                side = math.isqrt(group * own)
                memory.require(
                    num_memories == 0 or (exact and num_memories % group == 0),
                    "table.share_ratio",
                    f"must cut {num_memories} memories into groups of equal size",
                )
                firsts = tuple(i // group * group * own for i in range(num_memories))
        most = max(slots, default=0)
        memory.require(
            most <= MAX_SLOTS,
            "address.num_keys",
            f"a table of {most:,} slots, at most 2**31 - 2**26 = {MAX_SLOTS:,}: int32",
        )
        virtual = math.isqrt(self.expansion) * side
        memory.require(
            self.shuffle != "explicit" or virtual**2 < 2**31,
            "address.shuffle",
            f"must be 'keyed' where virtual addresses, here {virtual**2:,}, reach 2**31: they are int32",
        )
        memory.require(
            self.top_m <= virtual,
            "address.top_m",
            f"must be at most the candidates of a side, sqrt(expansion) * num_keys = {virtual}",
        )
        of_memory = range(num_memories) if table.sharing == "none" else (0,) * num_memories
        windows = (Window(of, first, side**2) for of, first in zip(of_memory, firsts, strict=True))
        return TableLayout(slots, tuple(windows))

    def window_keys(self, site: MemorySite) -> int:
        """Returns the keys per side of the physical grid of a window: n, or more for a wide window."""
        return math.isqrt(site.window.size)

    def num_virtual_keys(self, site: MemorySite) -> int:
        """Returns K, the keys per side of the virtual grid, √E times those of the window."""
        return math.isqrt(self.expansion) * self.window_keys(site)

    def parameters(self, site: MemorySite) -> dict[str, Parameter]:
        """Returns the parameters that the switches leave on, with the shapes of the paper's section 3."""
        d, d_k, heads = site.context.embed_dim, self.key_dim, self.num_heads
        keys = (2, self.num_key_sets, self.num_ranks, self.num_virtual_keys(site), self.rank_key_dim)
        axes = (None, None, None, "keys", None)
        uses = heads // self.num_key_sets
        found = {
            "query": Parameter((d, 2 * self.num_queries * d_k), ("embed", None), "queries"),
            "keys": Parameter(keys, axes, "keys", "weights", uses),
        }
        if self.query_conv_width:
            conv = (self.query_conv_width, d)
            found["query_conv"] = Parameter(conv, (None, "embed"), "conv", "weights")
        if self.norm_query:
            found["query_scale"] = Parameter((d_k,), (None,), "norms", "gain")
        if self.norm_keys:
            found["key_scale"] = Parameter((d_k,), (None,), "norms", "gain")
        if self.tucker_rank:
            cores = (heads, self.num_cores, self.tucker_rank, self.tucker_rank)
            found["cores"] = Parameter(cores, (None,) * 4, "cores", "core")
        return found

    def scoring_flops(self, site: MemorySite) -> int:
        """Returns the FLOPs of all heads from key scores to cells.

        Per head, for r = 0: m² sums, and m for the chosen cells. For r >= 1: 2·2·r·K for the best rank-1
        scores of both sides, 2·r²·m + 2·r·m² for the exact grid, h·m·(2·r² + 2·r) for the cores.
        """
        r, m = self.tucker_rank, self.top_m
        if r == 0:
            return self.num_heads * (m * m + m)
        grid = 2 * r * r * m + 2 * r * m * m
        cores = self.num_cores * m * (2 * r * r + 2 * r)
        return self.num_heads * (2 * 2 * r * self.num_virtual_keys(site) + grid + cores)

    def kept_bytes(self, site: MemorySite) -> int:
        """Returns the bytes of a token's queries, candidates and cells.

        Queries are kept before and after their norm. Candidates, 2·H·m of them, have an index and r scores,
        and cells, H·m of them, an index and h scores, all of four bytes.
        """
        b = DTYPE_BYTES[site.context.dtype]
        queries = 2 * self.num_queries * self.key_dim * (2 * b if self.norm_query else b)
        candidates = 2 * self.num_heads * self.top_m * (1 + self.num_ranks)
        cells = self.num_heads * self.top_m * (1 + self.num_cores)
        taps = b * site.context.embed_dim if self.query_conv_width else 0
        return queries + 4 * (candidates + cells) + taps

    def choosing_width(self, site: MemorySite) -> int:
        """Returns the scores of all keys of both sides and every head, by rank and combined."""
        return 2 * self.num_heads * (self.num_ranks + 1) * self.num_virtual_keys(site)

    def stages(self, site: MemorySite) -> dict[str, Stage]:
        """Returns the stages of a training step, with their FLOPs.

        K is the number of keys per side.

        - `query`: 2·D·(2·(queries)·d_k + width of the convolution).
        - `side_scores`: 2·2·H·K·w. w is the width that `ops.key_scores.combined_scores` contracts: d_k, or
          r·d_k with a query per rank. Keys that are no candidates have no gradient.
        - `candidates`: scores of the 2·H·m candidates under every rank, 2·2·H·m·r·(width of a rank's key).
          Those keys were just read.
        - `grid`: the exact grid and the cores (see `scoring_flops`).
        """
        parameters, heads = self.parameters(site), self.num_heads
        query = parameters["query"].size
        query += parameters["query_conv"].size if self.query_conv_width else 0
        width = self.key_dim * (self.num_ranks if self.query_per_rank else 1)
        keys = self.num_virtual_keys(site)
        candidates = 2 * 2 * heads * self.top_m * self.num_ranks * self.rank_key_dim
        # The product of the side scores includes the weighing of the ranks' scores.
        weighing = heads * 2 * 2 * self.num_ranks * keys if self.tucker_rank else 0
        return {
            "query": Stage(2 * query, query, True),
            "side_scores": Stage(2 * 2 * heads * keys * width, parameters["keys"].size, False),
            "candidates": Stage(candidates, 0, True),
            "grid": Stage(self.scoring_flops(site) - weighing, 0, False),
        }

    def cache(self, site: MemorySite) -> dict[str, tuple[tuple[int, ...], str]]:
        """Returns what decoding keeps: the last inputs of the query convolution, if there is one."""
        back = self.query_conv_width - 1
        return {"query_inputs": ((back, site.context.embed_dim), site.context.dtype)} if back > 0 else {}

    def served(
        self, site: MemorySite, params: Mapping[str, "jax.Array"], buffers: Mapping[str, "jax.Array"]
    ) -> "dict[str, ServedKeys]":
        """Returns the normed keys, with the singular vectors u and t that a step would compute."""
        from ultramem_jax.layers.memory.product_key_retrieval import served_keys

        return {"keys": served_keys(site, self, params, buffers)}

    def index_buffers(self, site: MemorySite) -> dict[str, int | None]:
        """Returns the permutation of the explicit shuffle."""
        return {"permutation": None} if self.shuffle == "explicit" else {}

    def initial(self, site: MemorySite) -> MemoryInit:
        """Returns the initialisation of table and readout that `init` names."""
        from ultramem_jax.layers.memory.initializers import memory_init

        return memory_init(site)

    def addresser(self, site: MemorySite, name: str | None = None) -> "nn.Module":
        """Returns the Flax module of this addresser, `ProductKeyAddresser`."""
        from ultramem_jax.layers.memory.product_key_retrieval import ProductKeyAddresser

        return ProductKeyAddresser(site, self, name=name)

    def balance_numbers(self, site: MemorySite) -> int:
        """Returns how many numbers devices sum for a balance loss: the keys' gradient, and counts of keys.

        The gradient comes from the scores of all keys. Ranks that share a query are summed before.
        """
        if not self.balance_loss_weight:
            return 0
        ranks_summed = self.rank_keys == "full" and not self.query_per_rank
        keys = self.parameters(site)["keys"].size // (self.num_ranks if ranks_summed else 1)
        return keys + 2 * 2 * self.num_virtual_keys(site)

    def near_slots(self, num_slots: float) -> "list[ProductKeys]":
        """Returns the configs of the two n whose squares enclose the number."""
        side = max(math.isqrt(max(int(num_slots), 1)), 1)
        return [dataclasses.replace(self, num_keys=n) for n in (side, side + 1)]

    def most_reads(self, site: MemorySite) -> int:
        """Returns the largest number of reads, H·K: a head reads at most the candidates of a side."""
        return self.num_heads * self.num_virtual_keys(site)

    def with_reads(self, reads: int) -> "ProductKeys":
        """Returns the config with that many reads, distributed over the heads."""
        return dataclasses.replace(self, top_m=max(reads // self.num_heads, 1))

    def widths(self) -> "tuple[int, Callable[[int], ProductKeys]]":
        """Returns d_k, and the function that returns the config with another d_k."""
        return self.key_dim, lambda width: dataclasses.replace(self, key_dim=width)

    @property
    def own_slots(self) -> int:
        """Returns n², the slots that a memory adds to the model."""
        return self.num_keys**2

    @property
    def heads(self) -> tuple[Head, ...]:
        """Returns the H heads; each has the reads of its m best cells."""
        return tuple(Head(f"head {i + 1}", 0) for i in range(self.num_heads))

    @property
    def reads_in_words(self) -> str:
        """Returns the reads of a token in words, H·m."""
        return f"{self.num_heads}·{self.top_m}"

    def in_words(self) -> tuple[list[str], list[str]]:
        """Describes sizes and norms in words."""
        words = [f"n {self.num_keys}"]
        if self.expansion > 1:
            words.append(f"E {self.expansion}")
        if self.tucker_rank:
            words.append(f"r {self.tucker_rank}")
        words.append(f"d_k {self.key_dim}")
        norms = {"query": self.norm_query, "key": self.norm_keys}
        named = "/".join(name for name, on in norms.items() if on)
        return words, [f"{named} norm"] if named else []
