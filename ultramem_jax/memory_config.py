"""The choices of a memory layer: one dataclass for the whole family, each difference a field of its own.

`MemoryConfig` is part of `ultramem_jax.config`; it has a file of its own because it is the subject of this
project. The letters are those of the axis legend in `ultramem_jax`.
"""

import math
from dataclasses import dataclass
from typing import Any

from ultramem_jax.errors import at_least, choice, require
from ultramem_jax.field_types import Checked

_PREFIX = "model.memory."

MAX_SLOTS = 2**31 - 2**26
"""Of a table. Slots are int32, and the 2²⁶ numbers above stand for no slot in the rows of a step, which reads
fewer."""


_MAX_CONV_WIDTH = 256
_MAX_RANK = 32
_MAX_EXPANSION = 1024
"""Published models have a width of 4, ranks of 2 to 4, and 4 to 16 blocks."""


@dataclass(frozen=True)
class TableLayout:
    """Which rows of which table the memories of a model read; made by `MemoryConfig.layout`."""

    window_keys: int
    """Keys per side of the physical grid of one memory's window: n, or more where a memory reads more of a
    shared table than the n² slots that it adds."""
    num_virtual_keys: int
    """K, keys per side of its virtual grid, √E times those of the window."""
    num_tables: int
    """1 if all memories share a table, else one per memory."""
    num_slots: int
    """N, rows of a table."""
    offsets: tuple[int, ...]
    """First row of each memory's window, which wraps around at the end of the table."""

    @property
    def window_slots(self) -> int:
        """The slots that one memory can reach."""
        return self.window_keys**2


@dataclass(frozen=True)
class MemoryConfig(Checked):
    """One memory layer. UltraMem's defaults; the constructors name the members of the family.

    `pkm()` has every change of the UltraMem paper off, `ultramem()` (numbers of the ablation in its table 2)
    every one on; `memory_plus()`, `peer()` and `ultramem_v2()` switch on what those papers added. Places and
    sizes are yours to set: with the default placement every layer has a memory, also of the older systems,
    which were published with one (PKM, PEER) or a few.
    """

    PREFIX = _PREFIX

    placement: str = "full"
    """Which layer feeds which memory (`ultramem_jax.placement`). Change 4, "split big memory & skip"."""
    num_keys: int = 128
    """n, keys per side of the physical grid; a memory adds n² slots to the model (see `table_sharing`)."""
    top_m: int = 16
    """m, values read per head and token."""
    num_heads: int = 2
    """H, retrieval heads; their reads are summed."""
    key_dim: int = 64
    """d_k, width of a query and of a key, per side."""
    value_dim: int = 128
    """d_v, width of a stored value. Change 2, "half vdim + proj", is D/2 with `project_values`."""
    softmax: bool = False
    """Scores pass through a softmax over the m reads of a head. Change 1 removes it."""
    project_values: bool = True
    """A linear map (E·d_v -> D) after pooling; without it d_v must equal D and the blocks be one."""
    share_query: bool = True
    """Change 3: all heads use one query."""
    share_keys: bool = False
    """All heads have the same keys (PEER)."""
    norm_query: bool = True
    """Change 5, "query/key LN": an RMS norm with gain over d_k on queries ..."""
    norm_keys: bool = True
    """... and one on keys."""
    expansion: int = 4
    """Change 6, Implicit Value Expansion: E virtual blocks per table, a square. 1 is off."""
    sum_blocks: bool = False
    """The E blocks are summed before the projection, which is then one of d_v -> D (UltraMemV2)."""
    shuffle: str = "keyed"
    """How virtual addresses are permuted: `keyed` computes a bijection on the fly (where there is something
    to gain: E > 1 or a shared table), `explicit` reads a stored permutation of E·n² entries (random at first;
    for imported weights), `none` leaves them as they are."""
    shuffle_seed: int = 0
    """Which permutation; each memory of a model adds its own index."""
    tucker_rank: int = 2
    """Change 7, TDQKR: r, rank of the Tucker core. 0 is off: row and column scores are added, as in PKM."""
    rank_keys: str = "split"
    """`split`: the d_k dimensions fall into r groups, one per rank (the paper). `full`: every rank has keys
    of full width d_k and all ranks share the query (the authors' code)."""
    query_per_rank: bool = False
    """With `full` rank keys: a query of width d_k for every rank instead of a shared one (UltraMemV2)."""
    num_cores: int = 2
    """Change 8, Multi-Core Scoring: h cores, one score per slice of d_v/h. 1 is off."""
    core_loss_weight: float = 1e-3
    """α of the auxiliary loss on the core's singular values (paper, section 3). 0 is off."""
    core_loss_margin: float = 0.15
    """τ: the singular values λ_i, i >= 2, are pushed below it."""
    balance_loss_weight: float = 0.0
    """β of the loss that spreads the candidates of a micro-batch over the keys of a side (UltraMemV2). 0 is
    off."""
    pre_value_dim: int = 0
    """d_p, width of a second vector per slot, the pre-value u (PEER, UltraMemV2): a slot is then an expert of
    inner width 1, whose score is multiplied by act(u·p), p a projection of x. 0 is off."""
    project_pre_values: bool = True
    """p is a linear map (D -> d_p) of x; else x itself, and d_p must equal D (PEER)."""
    pre_value_activation: str = "none"
    """act: `none` or `gelu`."""
    gate: bool = False
    """The pooled values are multiplied by SiLU(W·x) before the projection (Memory+)."""
    table_sharing: str = "none"
    """`none`: a table of n² slots for every memory. `all`: one table of n² slots, read whole by all memories
    (Memory+). `ring`: one table of M·n² slots for M memories; memory i reads the window of `share_ratio`·M·n²
    slots that starts at i·n² and wraps around (UltraMemV2). `blocks`: the same table in 1/`share_ratio`
    windows, each read by neighbouring memories."""
    share_ratio: float = 1.0
    """The part of a `ring` or `blocks` table that one memory reads: the largest square of slots within it. In
    a ring of M memories less than 1/M leaves slots that no memory reaches, in blocks the square may."""
    table_dtype: str = "float32"
    """Of the stored values and pre-values, `float32` or `bfloat16`; then rows are trained with stochastic
    rounding (`TrainConfig.row_rounding`). Sums over rows are made in the model's dtype either way."""
    memory_kind: str = "device"
    """Where tables and their moments lie: `device`, or `pinned_host`, the memory of the host, from which
    the rows of a step are fetched. For tables larger than an accelerator; the numbers are the same."""
    partition: str = "slots"
    """How tables are split over the devices of a mesh (`MeshConfig`): `slots`, rows over its axis `memory`;
    `width`, columns over `memory`; `both`, rows over `memory` and columns over `width`. The numbers are the
    same, up to the rounding of sums, which travel in the model's dtype."""
    init: str = "paper"
    """Change 9. `paper`: output variance starts at 1/(2L) (without softmax, whose weights are smaller).
    `reference`: as in the authors' code of UltraMem. `pkm`: as in Product-Key Memory. `v2`: UltraMemV2."""
    value_lr_multiple: float = 10.0
    """Change 10: the learning rate of values and pre-values starts at this multiple and falls linearly to 1x
    (paper: 10; the authors' code and V2: 4). 1 is off."""
    query_conv_width: int = 4
    """Change 11: width of the causal depthwise convolution before the query projection. 0 is off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, model__memory__num_keys=self.num_keys, model__memory__top_m=self.top_m)
        at_least(1, model__memory__num_heads=self.num_heads, model__memory__key_dim=self.key_dim)
        at_least(1, model__memory__value_dim=self.value_dim, model__memory__num_cores=self.num_cores)
        at_least(1, model__memory__value_lr_multiple=self.value_lr_multiple)
        at_least(0, model__memory__tucker_rank=self.tucker_rank)
        at_least(0, model__memory__pre_value_dim=self.pre_value_dim)
        at_least(0, model__memory__query_conv_width=self.query_conv_width)
        self._require(
            self.query_conv_width <= _MAX_CONV_WIDTH,
            "query_conv_width",
            f"must be at most {_MAX_CONV_WIDTH}: each tap is a step of the compiled program",
        )
        self._require(
            self.tucker_rank <= _MAX_RANK,
            "tucker_rank",
            f"must be at most {_MAX_RANK}: each of its r² products is a step of the compiled program",
        )
        self._require(
            self.expansion <= _MAX_EXPANSION,
            "expansion",
            f"must be at most {_MAX_EXPANSION}: each block has a projector of its own",
        )
        at_least(0, model__memory__core_loss_weight=self.core_loss_weight)
        at_least(0, model__memory__core_loss_margin=self.core_loss_margin)
        at_least(0, model__memory__balance_loss_weight=self.balance_loss_weight)
        at_least(0, model__memory__shuffle_seed=self.shuffle_seed)
        choice(_PREFIX + "shuffle", self.shuffle, ("keyed", "explicit", "none"))
        choice(_PREFIX + "rank_keys", self.rank_keys, ("split", "full"))
        choice(_PREFIX + "init", self.init, ("paper", "reference", "pkm", "v2"))
        choice(_PREFIX + "table_dtype", self.table_dtype, ("float32", "bfloat16"))
        choice(_PREFIX + "memory_kind", self.memory_kind, ("device", "pinned_host"))
        choice(_PREFIX + "partition", self.partition, ("slots", "width", "both"))
        choice(_PREFIX + "table_sharing", self.table_sharing, ("none", "all", "ring", "blocks"))
        choice(_PREFIX + "pre_value_activation", self.pre_value_activation, ("none", "gelu"))
        self._require(
            self.expansion >= 1 and math.isqrt(self.expansion) ** 2 == self.expansion,
            "expansion",
            "must be a square: 1, 4, 9, 16, ...",
        )
        self._require(
            self.value_dim % self.num_cores == 0, "num_cores", f"must divide value_dim = {self.value_dim}"
        )
        self._require(
            self.num_cores == 1 or self.tucker_rank >= 1,
            "num_cores",
            "must be 1 while tucker_rank is 0: the cores are Tucker cores",
        )
        if self.tucker_rank > 1 and self.rank_keys == "split":
            self._require(
                self.key_dim % self.tucker_rank == 0,
                "tucker_rank",
                f"must divide key_dim = {self.key_dim} while rank_keys is 'split'",
            )
        self._require(
            not self.query_per_rank or (self.tucker_rank >= 1 and self.rank_keys == "full"),
            "query_per_rank",
            "must be False unless tucker_rank is 1 or more and rank_keys is 'full'",
        )
        self._require(
            not (self.share_keys and self.share_query) or self.num_heads == 1 or self.tucker_rank > 0,
            "share_keys",
            "must be False while share_query is True and tucker_rank 0: all heads would read the same",
        )
        self._require(
            self.num_blocks == 1 or self.project_values,
            "project_values",
            f"must be True while expansion is {self.expansion}: each block needs its projector",
        )
        self._require(
            not self.gate or self.num_blocks == 1,
            "gate",
            f"must be False while expansion is {self.expansion} and sum_blocks False: it gates d_v values",
        )
        self._require(
            0 < self.share_ratio <= 1 and (self.share_ratio == 1 or self.table_sharing in ("ring", "blocks")),
            "share_ratio",
            "must be in (0, 1], and 1 unless table_sharing is 'ring' or 'blocks'",
        )
        self._require(
            self.pre_value_dim > 0 or (self.pre_value_activation == "none" and self.project_pre_values),
            "pre_value_dim",
            "must be at least 1 for pre_value_activation or project_pre_values to have a meaning",
        )
        if self.table_sharing in ("none", "all"):
            self.layout(1)  # the same for any number of memories, so it can be checked here

    def _require(self, condition: bool, field: str, allowed: str) -> None:
        require(condition, _PREFIX + field, getattr(self, field), allowed)

    def layout(self, num_memories: int) -> TableLayout:
        """Tables, windows and grids of a model with that many memories.

        The window of a shared table is the largest square within its share, as in the authors' code.

        Raises:
            UserError: shares that do not divide the memories, more slots or addresses than an int32 counts,
                or a window with fewer than m keys per side.
        """
        side, tables, slots = self.num_keys, num_memories, self.num_keys**2
        offsets = (0,) * num_memories
        if self.table_sharing == "all":
            tables = min(num_memories, 1)
        elif self.table_sharing != "none":
            tables, slots = min(num_memories, 1), max(num_memories, 1) * slots
            own = self.num_keys**2
            if self.table_sharing == "ring":
                side = int((slots * self.share_ratio) ** 0.5)
                offsets = tuple(i * own for i in range(num_memories))
            else:
                # A third can only be written with an error.
                group = max(round(self.share_ratio * num_memories), 1)
                exact = math.isclose(group, self.share_ratio * num_memories, abs_tol=1e-3)
                side = math.isqrt(group * own)
                self._require(
                    num_memories == 0 or (exact and num_memories % group == 0),
                    "share_ratio",
                    f"must cut {num_memories} memories into groups of equal size",
                )
                offsets = tuple(i // group * group * own for i in range(num_memories))
        self._require(
            slots <= MAX_SLOTS,
            "num_keys",
            f"a table of {slots:,} slots, at most 2**31 - 2**26 = {MAX_SLOTS:,}: int32",
        )
        virtual = math.isqrt(self.expansion) * side
        self._require(
            self.shuffle != "explicit" or virtual**2 < 2**31,
            "shuffle",
            f"must be 'keyed' where virtual addresses, here {virtual**2:,}, reach 2**31: they are int32",
        )
        self._require(
            self.top_m <= virtual,
            "top_m",
            f"must be at most the candidates of a side, sqrt(expansion) * num_keys = {virtual}",
        )
        return TableLayout(side, virtual, tables, slots, offsets)

    @property
    def num_blocks(self) -> int:
        """Blocks that are pooled apart from each other: E, or 1 if they are summed."""
        return 1 if self.sum_blocks else self.expansion

    @property
    def num_ranks(self) -> int:
        """Score vectors per side: r, or 1 without a Tucker core."""
        return max(self.tucker_rank, 1)

    @property
    def num_queries(self) -> int:
        """Queries of width d_k per side: one if the heads share it, else one per head; times r per rank."""
        return (1 if self.share_query else self.num_heads) * (self.tucker_rank if self.query_per_rank else 1)

    @property
    def num_key_sets(self) -> int:
        """Sets of keys per side: one if the heads share them, else one per head."""
        return 1 if self.share_keys else self.num_heads

    @property
    def rank_key_dim(self) -> int:
        """Width of the part of a key that one rank scores with."""
        return self.key_dim // self.num_ranks if self.rank_keys == "split" else self.key_dim

    @property
    def row_dim(self) -> int:
        """d_v + d_p, numbers stored per slot."""
        return self.value_dim + self.pre_value_dim

    @property
    def shares_table(self) -> bool:
        """Whether all memories of a model read one table."""
        return self.table_sharing != "none"

    @classmethod
    def pkm(cls, **fields: Any) -> "MemoryConfig":
        """Product-Key Memory (arXiv 1907.05242): every switch off. Give `value_dim` = D."""
        off: dict[str, Any] = dict(
            softmax=True,
            project_values=False,
            share_query=False,
            norm_query=False,
            norm_keys=False,
            expansion=1,
            tucker_rank=0,
            num_cores=1,
            init="pkm",
            value_lr_multiple=1.0,
            query_conv_width=0,
        )
        return cls(**(off | fields))

    @classmethod
    def ultramem(cls, **fields: Any) -> "MemoryConfig":
        """UltraMem (arXiv 2411.12364): every switch on."""
        return cls(**fields)

    @classmethod
    def memory_plus(cls, **fields: Any) -> "MemoryConfig":
        """Memory+ (arXiv 2412.09764): PKM with norms, one table for all memories and a SiLU gate.

        The norm of the keys is applied. (The UltraMemV2 authors' release computes it and uses the plain keys;
        `norm_keys=False` is that.)
        """
        on: dict[str, Any] = dict(
            norm_query=True,
            norm_keys=True,
            project_values=True,
            gate=True,
            table_sharing="all",
            shuffle="none",
        )
        return cls.pkm(**(on | fields))

    @classmethod
    def peer(cls, **fields: Any) -> "MemoryConfig":
        """PEER (arXiv 2407.04153): experts of inner width 1, heads with queries of their own and common keys.

        Give `value_dim` = `pre_value_dim` = D. Queries pass an RMS norm where PEER has a batch norm, which
        would make a token's output depend on its batch.
        """
        on: dict[str, Any] = dict(
            share_keys=True,
            norm_query=True,
            project_pre_values=False,
            pre_value_activation="gelu",
        )
        return cls.pkm(**(on | fields))

    @classmethod
    def ultramem_v2(cls, **fields: Any) -> "MemoryConfig":
        """UltraMemV2 (arXiv 2508.18756): give `pre_value_dim`, and `share_ratio` for less than the ring."""
        on: dict[str, Any] = dict(
            placement="full",
            num_heads=1,
            expansion=1,
            sum_blocks=True,
            rank_keys="full",
            core_loss_weight=0.0,
            table_sharing="ring",
            init="v2",
            value_lr_multiple=4.0,
            query_conv_width=0,
        )
        return cls(**(on | fields))
