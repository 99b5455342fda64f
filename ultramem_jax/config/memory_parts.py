"""Declares the contract of a memory: what its parts answer about themselves, from their configs alone.

A memory is an *addresser* (tokens -> which rows, with what weights), a *table* (the rows) and a *readout*
(pooled rows -> (B, S, D)). Whoever counts, shards, caches, serves or compares memories asks the parts, and
knows none of their fields: `AddressConfig` and `ReadoutConfig` are the questions. What runs is in
`ultramem_jax.layers.memory`. The letters are those of the axis legend in `ultramem_jax`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from ultramem_jax.config.field_types import Checked

if TYPE_CHECKING:
    import numpy as np

    from ultramem_jax.config.memory import MemoryConfig, MemorySite

MAX_SLOTS = 2**31 - 2**26
"""Bound of a table's rows. Slots are int32, and the top 2²⁶ are reserved as padding of the rows of a step."""

Role = Literal["matrix", "weights", "gain", "core"]


class Parameter(NamedTuple):
    """Describes one dense parameter of a memory: what counting, sharding and serving must know of it."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    """Logical axes, `parallel.rules.MESH_AXES` has their mesh axes; None is never split."""
    group: str
    """What `accounting.Parameters.memory` counts it under."""
    role: Role = "matrix"
    """`matrix`: (in, out) of a product with a token's vector, served by output. `weights`: numbers that meet
    a token's vector in another way. `gain`: a vector of a norm or a bias, which papers do not count. `core`:
    a weight that papers count, and that meets scores and never a token's vector."""
    uses: int = 1
    """How often a token meets each number."""

    @property
    def size(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    @property
    def flops(self) -> int:
        """Of a token: a multiplication and an addition for each weight and use."""
        return 2 * self.size * self.uses if self.role in ("matrix", "weights") else 0


class Window(NamedTuple):
    """Names the rows of a table that one memory reads; past the end of the table they go on at its start."""

    table: int
    """Which of the tables."""
    first: int
    """Row."""
    size: int
    """Rows."""


@dataclass(frozen=True)
class TableLayout:
    """Lists the tables of the memories that have one config, and which rows of them each memory reads."""

    num_slots: tuple[int, ...]
    """N of each table."""
    windows: tuple[Window, ...]
    """Of each memory."""


class Stage(NamedTuple):
    """Describes a stage of addressing in a training step, for floors of its time."""

    flops: int
    """Of a token, forward."""
    weights: int
    """Parameters that it reads."""
    backward: bool
    """Whether the backward pass does it twice more, by input and by weight."""


class MemoryInit(NamedTuple):
    """Says how the parts around an addresser start, so that its scores and their values fit each other."""

    values_std: float
    """Standard deviation of the values of a table."""
    pre_values_std: float = 1.0
    """Of its pre-values."""
    projection: Callable[..., Any] | None = None
    """Initialiser of the map from pooled values to D."""
    input: Callable[..., Any] | None = None
    """Initialiser of maps that meet x beside the query: of pre-values, and of a gate."""


@dataclass(frozen=True)
class ModelContext:
    """Says what a memory must know of the model that it is in."""

    embed_dim: int
    """D."""
    num_layers: int
    """L."""
    vocab_size: int
    """V."""
    inner_ratio: float
    """Inner width of the feed-forward over D; of a Mixture of Experts, of the k that a token visits."""
    dtype: str
    """Of the computation."""
    norm_eps: float
    starts: tuple[int, ...]
    """The layers, from 1, at which the memories of this config read. Their number is M."""


@dataclass(frozen=True)
class AddressConfig(Checked):
    """Says how a memory finds the rows that a token reads. Subclasses are kinds, `memory_kinds.ADDRESSERS`.

    A subclass has the field `kind: Literal["its_name"] = "its_name"` and answers below. `site` is the memory
    in its model (`MemorySite`): its config, its number, and the context of its model.
    """

    PREFIX: ClassVar[str] = "address."

    kind: str = ""

    @property
    def reads_per_token(self) -> int:
        """R."""
        raise NotImplementedError

    @property
    def num_blocks(self) -> int:
        """E, blocks in which the reads of a token are summed apart from each other."""
        return 1

    @property
    def weights_per_read(self) -> int:
        """h, weights of a read; each weighs a slice of d_v/h values."""
        return 1

    @property
    def reads_apart(self) -> bool:
        """Whether every read is a block of its own: read j is in block j of R."""
        return False

    @property
    def weighs_reads(self) -> bool:
        """Whether reads have weights; else they are all one, and a lookup has no sums."""
        return True

    def check(self, memory: "MemoryConfig") -> None:
        """Raises `UserError` where the address does not go with table and readout, by `memory.require`."""

    def check_beside(self, others: "Sequence[AddressConfig]") -> None:
        """Raises `UserError` where other memories of the model would address rows in the same way."""

    def layout(self, memory: "MemoryConfig", context: ModelContext) -> TableLayout:
        """Returns the tables of all memories of a config, and who reads what.

        Raises:
            UserError: more slots than an int32 counts, or sharing that the memories do not divide into.
        """
        raise NotImplementedError

    def parameters(self, site: "MemorySite") -> dict[str, Parameter]:
        """Returns the addresser's dense parameters by name; names are its own among all of the memory."""
        return {}

    def scoring_flops(self, site: "MemorySite") -> int:
        """Returns the FLOPs of a token beside those of the parameters: choosing rows among scores."""
        return 0

    def stages(self, site: "MemorySite") -> dict[str, Stage]:
        """Returns the stages of a training step by name, in their order."""
        return {}

    def cache(self, site: "MemorySite") -> dict[str, tuple[tuple[int, ...], str]]:
        """Returns what decoding remembers of a sequence: name -> shape behind B, and dtype."""
        return {}

    def served(self, site: "MemorySite", params: dict[str, Any], buffers: dict[str, Any]) -> dict[str, Any]:
        """Returns what stands in place of parameters in a model that is served, beside its matrices."""
        return {}

    def initial(self, site: "MemorySite") -> MemoryInit:
        """Returns how table and readout start."""
        raise NotImplementedError

    def addresser(self, site: "MemorySite", name: str | None = None) -> Any:
        """Returns the module (h (B, S, D), token_ids (B, S), chunk) -> `layers.memory.addresser.Reads`."""
        raise NotImplementedError

    @property
    def reads_tokens(self) -> bool:
        """Whether rows depend on the tokens themselves, and so on the tokenizer."""
        return False

    def with_token_map(self, canonical_ids: "np.ndarray") -> "AddressConfig":
        """Returns the config for a tokenizer, given the canonical id (V,) of each of its tokens."""
        return self

    def token_buffers(self, site: "MemorySite", canonical_ids: "np.ndarray") -> "dict[str, np.ndarray]":
        """Returns the buffers that depend on the tokenizer, by their names in the memory."""
        return {}

    def balance_numbers(self, site: "MemorySite") -> int:
        """Returns how many float32 numbers a micro-batch all-reduces for balance losses."""
        return 0

    def near_slots(self, num_slots: float) -> "Sequence[AddressConfig]":
        """Returns the configs whose own slots are nearest to that many, one or several to choose from."""
        raise NotImplementedError

    def most_reads(self, site: "MemorySite") -> int:
        """Returns the most reads of a token that there can be with these slots."""
        return self.reads_per_token

    def with_reads(self, reads: int) -> "AddressConfig":
        """Returns the config with at most that many reads per token, as near to it as can be."""
        return self

    def widths(self) -> "tuple[int, Callable[[int], AddressConfig]] | None":
        """Returns the width that sets the cost of addressing and what changes it; None if nothing does."""
        return None

    @property
    def own_slots(self) -> int:
        """Slots that one memory adds to a model."""
        raise NotImplementedError

    @property
    def slots_hint(self) -> str:
        """The field that makes the slots divisible by their owners, in parentheses; empty where none does."""
        return ""

    @property
    def reads_in_words(self) -> str:
        """R, as a product where it is one."""
        return str(self.reads_per_token)

    def in_words(self) -> tuple[list[str], list[str]]:
        """Returns what tells the config from others of its kind in a few words: sizes, and what else."""
        return [], []


@dataclass(frozen=True)
class ReadoutConfig(Checked):
    """Says what a memory makes of the rows it read. Subclasses are the kinds, `memory_kinds.READOUTS`."""

    PREFIX: ClassVar[str] = "readout."

    kind: str = ""

    @property
    def sums_blocks(self) -> bool:
        """Whether the blocks are summed before the readout sees them."""
        return False

    @property
    def power(self) -> float:
        """Mean square of what the readout multiplies pooled values by."""
        return 1.0

    def check(self, memory: "MemoryConfig") -> None:
        """Raises `UserError` where the readout does not go with address and table."""

    def check_model(self, memory: "MemoryConfig", context: ModelContext) -> None:
        """Raises `UserError` where the memory does not fit into the model, by `memory.require`."""

    def parameters(self, site: "MemorySite") -> dict[str, Parameter]:
        """Returns the readout's dense parameters by name."""
        return {}

    def extra_flops(self, site: "MemorySite") -> int:
        """Returns the FLOPs of a token beside those of the parameters that grow with a width."""
        return 0

    def cache(self, site: "MemorySite") -> dict[str, tuple[tuple[int, ...], str]]:
        """Returns what decoding remembers of a sequence: name -> shape behind B, and dtype."""
        return {}

    def readout(self, site: "MemorySite", name: str | None = None) -> Any:
        """Returns the module (pooled (T, E, d_v), h (B, S, D), chunk) -> (B, S, D)."""
        raise NotImplementedError

    def in_words(self) -> list[str]:
        """Returns what tells the config from others of its kind, in a few words."""
        return []


@dataclass(frozen=True)
class TableConfig(Checked):
    """Describes the rows of a memory: what they hold, who shares them, where they lie, how they are split."""

    PREFIX: ClassVar[str] = "table."

    value_dim: int = 128
    """d_v, width of a stored value. UltraMem's change 2, "half vdim + proj", is D/2 with a projection."""
    pre_value_dim: int = 0
    """d_p, width of a second vector per slot, the pre-value u (PEER, UltraMemV2): a slot is then an expert of
    inner width 1, whose weight is multiplied by act(u·p), p a projection of x. 0 is off."""
    project_pre_values: bool = True
    """p is a linear map (D -> d_p) of x; else x itself, and d_p must equal D (PEER)."""
    pre_value_activation: Literal["none", "gelu"] = "none"
    """act."""
    sharing: Literal["none", "all", "ring", "blocks"] = "none"
    """`none`: a table for every memory. `all`: one table, read whole by all memories (Memory+). `ring`: one
    table of the slots of all M memories; memory i reads the window of `share_ratio` of them that starts at
    its own slots and wraps around (UltraMemV2). `blocks`: the same table in 1/`share_ratio` windows, each
    read by neighbouring memories."""
    share_ratio: float = 1.0
    """The part of a `ring` or `blocks` table that one memory reads. In a ring of M memories less than 1/M
    leaves slots that no memory reaches."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the stored values and pre-values; rows in bfloat16 are trained with stochastic rounding
    (`TrainConfig.row_rounding`). Sums over rows are made in the model's dtype either way."""
    memory_kind: Literal["device", "pinned_host"] = "device"
    """Where tables and their moments lie: `device`, or `pinned_host`, the memory of the host, from which
    the rows of a step are fetched. For tables larger than an accelerator; the numbers are the same."""
    partition: Literal["slots", "width", "both"] = "slots"
    """How tables are split over the devices of a mesh (`MeshConfig`): `slots`, rows over its axis `memory`;
    `width`, columns over `memory`; `both`, rows over `memory` and columns over `width`. The numbers are the
    same, up to the rounding of sums, which travel in the model's dtype."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "value_dim")
        self.at_least(0, "pre_value_dim")
        windows = self.sharing in ("ring", "blocks")
        self.require(
            0 < self.share_ratio <= 1 and (self.share_ratio == 1 or windows),
            "share_ratio",
            "must be in (0, 1], and 1 unless sharing is 'ring' or 'blocks'",
        )
        self.require(
            self.pre_value_dim > 0 or (self.pre_value_activation == "none" and self.project_pre_values),
            "pre_value_dim",
            "must be at least 1 for pre_value_activation or project_pre_values to have a meaning",
        )

    @property
    def row_dim(self) -> int:
        """d_v + d_p, numbers stored per slot."""
        return self.value_dim + self.pre_value_dim

    @property
    def arrays(self) -> dict[str, int]:
        """The arrays of a table by name, and how wide their rows are."""
        widths = {"values": self.value_dim, "pre_values": self.pre_value_dim}
        return {name: width for name, width in widths.items() if width}

    @property
    def is_shared(self) -> bool:
        """Whether all memories of a config read one table."""
        return self.sharing != "none"

    def parameters(self, site: "MemorySite") -> dict[str, Parameter]:
        """Returns the dense parameters that products with pre-values need."""
        if not (self.pre_value_dim and self.project_pre_values):
            return {}
        shape = (site.context.embed_dim, self.pre_value_dim)
        return {"pre_projection": Parameter(shape, ("embed", None), "pre_projection")}
