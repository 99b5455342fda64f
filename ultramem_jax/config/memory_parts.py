"""Declares the contract of a memory's parts: the questions that their configs answer about them.

A memory has an *addresser* (tokens -> rows and their weights), a *table* (the rows) and a *readout*
(pooled rows -> (B, S, D)). Code that counts, shards, caches, serves or compares memories asks these parts and
knows none of their fields. `AddressConfig` and `ReadoutConfig` declare the questions. The layers that run are
in `ultramem_jax.layers.memory`. The letters are those of the axis legend in `ultramem_jax`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from ultramem_jax.config.field_types import Checked
from ultramem_jax.errors import UserError
from ultramem_jax.tree_types import ArrayTree

if TYPE_CHECKING:
    import jax
    import numpy as np
    from flax import linen as nn

    from ultramem_jax.config.memory import MemoryConfig, MemorySite

MAX_SLOTS = 2**31 - 2**26
"""Upper bound of a table's rows. Slots are int32, and the top 2²⁶ ids are reserved as padding of the rows of
a step."""

Role = Literal["matrix", "weights", "gain", "core"]
"""Use of a dense parameter, see `Parameter.role`."""


class Parameter(NamedTuple):
    """Describes one dense parameter of a memory, for counting, sharding and serving."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    """Logical axis of every dimension, which `parallel.rules.MESH_AXES` maps to mesh axes. None is never
    split."""
    group: str
    """Key under which `accounting.Parameters.memory` counts the parameter."""
    role: Role = "matrix"
    """Use of the parameter. `matrix`: the (in, out) matrix of a product with a token's vector, served by
    output. `weights`: numbers that multiply a token's vector in another way. `gain`: a vector of a norm or a
    bias, which papers do not count. `core`: a weight that papers count, and that multiplies scores and never
    a token's vector."""
    uses: int = 1
    """Number of times that each number is used for a token."""

    @property
    def size(self) -> int:
        """Returns the number of elements."""
        return math.prod(self.shape)

    @property
    def flops(self) -> int:
        """Returns the FLOPs of a token: a multiplication and an addition for each weight and use."""
        return 2 * self.size * self.uses if self.role in ("matrix", "weights") else 0


class Window(NamedTuple):
    """Names the rows of a table that one memory reads; past the end of the table they wrap to its start."""

    table: int
    """Index of the table."""
    first: int
    """First row of the window."""
    size: int
    """Number of rows."""


@dataclass(frozen=True)
class TableLayout:
    """Lists the tables of the memories that have one config, and the rows that each memory reads."""

    num_slots: tuple[int, ...]
    """Rows N of each table."""
    windows: tuple[Window, ...]
    """Window of each memory."""


class Stage(NamedTuple):
    """Describes a stage of addressing in a training step, to compute a floor of its time."""

    flops: int
    """FLOPs of a token in the forward pass."""
    weights: int
    """Number of parameters that the stage reads."""
    backward: bool
    """True if the backward pass repeats the products of the stage twice, by input and by weight."""


class Head(NamedTuple):
    """Describes reads of a token that belong together: those of a head, or of n-grams of one order."""

    name: str
    """Name of the head, for people."""
    order: int
    """n, the number of tokens that decide these reads, the last one included; 0 if h decides them."""


class MemoryInit(NamedTuple):
    """Gives the initialisation of table and readout, so that scores and values fit each other."""

    values_std: float
    """Standard deviation of the values of a table."""
    pre_values_std: float = 1.0
    """Standard deviation of the pre-values of a table."""
    projection: "Callable[..., jax.Array] | None" = None
    """Initialiser of the map from pooled values to D."""
    input: "Callable[..., jax.Array] | None" = None
    """Initialiser of the other maps of x beside the query: those of pre-values and of a gate."""


@dataclass(frozen=True)
class ModelContext:
    """Holds the facts about its model that a memory needs."""

    embed_dim: int
    """D, width of the residual stream."""
    num_layers: int
    """L, layers of the model."""
    vocab_size: int
    """V, size of the vocabulary."""
    inner_ratio: float
    """Inner width of the feed-forward divided by D. For a Mixture of Experts, the inner width of the k
    experts of a token together."""
    dtype: str
    """Dtype of the computation."""
    norm_eps: float
    """Epsilon of RMS norms."""
    starts: tuple[int, ...]
    """Layers, from 1, in which the memories of this config read. There are M of them."""


@dataclass(frozen=True)
class AddressConfig(Checked):
    """Configures how a memory finds the rows that a token reads. Subclasses are `memory_kinds.ADDRESSERS`.

    A subclass has the field `kind: Literal["its_name"] = "its_name"` and overrides the answers below. `site`
    describes the memory in its model (`MemorySite`): its config, its number, and the context of its model.
    """

    PREFIX: ClassVar[str] = "address."

    kind: str = ""
    """Name of the kind in `memory_kinds.ADDRESSERS`."""

    @property
    def reads_per_token(self) -> int:
        """Returns R, the rows that a token reads."""
        raise NotImplementedError

    @property
    def heads(self) -> tuple[Head, ...]:
        """Returns the heads among which the R reads of a token are divided evenly, in their order."""
        return (Head("head 1", 0),)

    @property
    def num_blocks(self) -> int:
        """Returns E, the number of blocks; the reads of each block are summed separately."""
        return 1

    @property
    def weights_per_read(self) -> int:
        """Returns h, the weights of a read; each weighs a slice of d_v/h values."""
        return 1

    @property
    def reads_apart(self) -> bool:
        """Tells whether every read is a block of its own: read j is in block j of R."""
        return False

    @property
    def weighs_reads(self) -> bool:
        """Tells whether the addresser weighs reads; if not, all weights are one and a lookup has no sums."""
        return True

    def check(self, memory: "MemoryConfig") -> None:
        """Raises `UserError`, by `memory.require`, if the address does not fit table and readout."""

    def check_beside(self, others: "Sequence[AddressConfig]") -> None:
        """Raises `UserError` if another memory of the model would address rows in the same way."""

    def layout(self, memory: "MemoryConfig", context: ModelContext) -> TableLayout:
        """Returns the tables of all memories of a config, and the rows that each memory reads.

        Raises:
            UserError: more slots than int32 can count, or memories that the chosen sharing cannot divide.
        """
        raise NotImplementedError

    def parameters(self, site: "MemorySite") -> dict[str, Parameter]:
        """Returns the addresser's dense parameters by name. No other part of the memory may use a name."""
        return {}

    def scoring_flops(self, site: "MemorySite") -> int:
        """Returns the FLOPs of a token that choose rows from scores, beside products with parameters."""
        return 0

    def kept_bytes(self, site: "MemorySite") -> int:
        """Returns the bytes of a token that addressing keeps for the backward pass."""
        return 0

    def choosing_width(self, site: "MemorySite") -> int:
        """Returns the float32 values of a token that are held at a time while its rows are chosen."""
        return 0

    def stages(self, site: "MemorySite") -> dict[str, Stage]:
        """Returns the stages of addressing in a training step by name, in their order."""
        return {}

    def cache(self, site: "MemorySite") -> dict[str, tuple[tuple[int, ...], str]]:
        """Returns the arrays that decoding keeps of each sequence: name -> shape without B, and dtype."""
        return {}

    def served(
        self, site: "MemorySite", params: dict[str, ArrayTree], buffers: dict[str, ArrayTree]
    ) -> dict[str, ArrayTree]:
        """Returns the arrays that replace parameters in a served model, except for its matrices."""
        return {}

    def initial(self, site: "MemorySite") -> MemoryInit:
        """Returns the initialisation of table and readout."""
        raise NotImplementedError

    def addresser(self, site: "MemorySite", name: str | None = None) -> "nn.Module":
        """Returns the module (h (B, S, D), token_ids (B, S), chunk) -> `layers.memory.addresser.Reads`."""
        raise NotImplementedError

    @property
    def reads_tokens(self) -> bool:
        """Tells whether rows depend on the token ids themselves, and therefore on the tokenizer."""
        return False

    def with_token_map(self, canonical_ids: "np.ndarray") -> "AddressConfig":
        """Returns the config for a tokenizer, given the canonical id (V,) of each of its tokens."""
        return self

    def token_buffers(self, site: "MemorySite", canonical_ids: "np.ndarray") -> "dict[str, np.ndarray]":
        """Returns the memory's buffers that depend on the tokenizer, by name."""
        return {}

    def index_buffers(self, site: "MemorySite") -> "dict[str, int | None]":
        """Returns the buffers of integers at which rows are read, by name, with their exclusive upper bounds.

        They are read without checks, so files are checked for them. A bound of None stands for a permutation,
        in which each number below the size of the buffer occurs once.
        """
        return {}

    def balance_numbers(self, site: "MemorySite") -> int:
        """Returns the count of float32 numbers that a micro-batch all-reduces for balance losses."""
        return 0

    def near_slots(self, num_slots: float) -> "Sequence[AddressConfig]":
        """Returns the configs whose own slots are nearest to `num_slots`: one, or several to choose from."""
        raise NotImplementedError

    def most_reads(self, site: "MemorySite") -> int:
        """Returns the largest number of reads per token that these slots allow."""
        return self.reads_per_token

    def with_reads(self, reads: int) -> "AddressConfig":
        """Returns the config with the reads per token that are nearest to `reads`, and not more."""
        return self

    def widths(self) -> "tuple[int, Callable[[int], AddressConfig]] | None":
        """Returns the width that sets the cost of addressing and a function that changes it, or None."""
        return None

    @property
    def own_slots(self) -> int:
        """Returns the number of slots that one memory adds to a model."""
        raise NotImplementedError

    @property
    def slots_hint(self) -> str:
        """Returns the field that makes owners divide slots, in parentheses, or an empty text if none does."""
        return ""

    @property
    def reads_in_words(self) -> str:
        """Returns R as text, as a product of its factors where it has some."""
        return str(self.reads_per_token)

    def in_words(self) -> tuple[list[str], list[str]]:
        """Returns short phrases that distinguish configs of one kind: first sizes, then other fields."""
        return [], []


@dataclass(frozen=True)
class ReadoutConfig(Checked):
    """Configures how a memory makes its output from pooled rows. Subclasses are `memory_kinds.READOUTS`."""

    PREFIX: ClassVar[str] = "readout."

    kind: str = ""
    """Name of the kind in `memory_kinds.READOUTS`."""

    @property
    def sums_blocks(self) -> bool:
        """Tells whether the blocks are summed before the readout receives them."""
        return False

    @property
    def last_factors(self) -> tuple[str, ...]:
        """Returns the parameters that make the output zero when they are zero, while they can still learn.

        They are the last factor of the output, and the biases beside it. None means the values of the table.
        """
        return ()

    @property
    def power(self) -> float:
        """Returns the mean square of the factor by which the readout multiplies pooled values."""
        return 1.0

    def check(self, memory: "MemoryConfig") -> None:
        """Raises `UserError`, by `memory.require`, if the readout does not fit address and table."""

    def check_model(self, memory: "MemoryConfig", context: ModelContext) -> None:
        """Raises `UserError`, by `memory.require`, if the memory does not fit into the model."""

    def parameters(self, site: "MemorySite") -> dict[str, Parameter]:
        """Returns the readout's dense parameters by name."""
        return {}

    def extra_flops(self, site: "MemorySite") -> int:
        """Returns the FLOPs of a token that grow with a width, beside products with parameters."""
        return 0

    def cache(self, site: "MemorySite") -> dict[str, tuple[tuple[int, ...], str]]:
        """Returns the arrays that decoding keeps of each sequence: name -> shape without B, and dtype."""
        return {}

    def value_matrix(self, site: "MemorySite", params: ArrayTree, block: int) -> "jax.Array | None":
        """Returns the matrix (d_v, D) that the pooled values of a block pass, or None if they are the output.

        Biases, and factors that depend on the hidden state, are not part of it. `inspection` asks for it.

        Args:
            site: the memory.
            params: its parameters by name.
            block: the block, in [0, E).

        Raises:
            UserError: this kind of readout does not say.
        """
        raise UserError(f"readout.kind = {self.kind!r}: must be a kind whose config has `value_matrix`")

    def readout(self, site: "MemorySite", name: str | None = None) -> "nn.Module":
        """Returns the module (pooled (T, E, d_v), h (B, S, D), chunk) -> (B, S, D)."""
        raise NotImplementedError

    def in_words(self) -> list[str]:
        """Returns short phrases that distinguish configs of one kind."""
        return []


@dataclass(frozen=True)
class TableConfig(Checked):
    """Configures the rows of a memory: their contents, sharing, storage, and partition over devices."""

    PREFIX: ClassVar[str] = "table."

    value_dim: int = 128
    """d_v, width of a stored value. UltraMem's change 2, "half vdim + proj", is D/2 with a projection."""
    pre_value_dim: int = 0
    """d_p, width of a second vector per slot, the pre-value u (PEER, UltraMemV2). A slot is then an expert of
    inner width 1: its weight is multiplied by act(u·p), where p is a projection of x. 0 switches this off."""
    project_pre_values: bool = True
    """True if p is a linear map (D -> d_p) of x; if False, p is x itself and d_p must equal D (PEER)."""
    pre_value_activation: Literal["none", "gelu"] = "none"
    """Activation act of the product u·p."""
    sharing: Literal["none", "all", "ring", "blocks"] = "none"
    """Sharing of tables between memories. `none`: every memory has its own table. `all`: all memories read
    one table as a whole (Memory+). `ring`: one table holds the slots of all M memories; memory i reads a
    window of the share `share_ratio` that starts at its own slots and wraps around (UltraMemV2). `blocks`:
    the same table has 1/`share_ratio` windows, and neighbouring memories read the same window."""
    share_ratio: float = 1.0
    """Part of a `ring` or `blocks` table that one memory reads. In a ring of M memories, a part below 1/M
    leaves slots that no memory reads."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the stored values and pre-values. Rows in bfloat16 are trained with stochastic rounding
    (`TrainConfig.row_rounding`). Sums over rows always have the model's dtype."""
    memory_kind: Literal["device", "pinned_host"] = "device"
    """Storage of tables and their moments: `device`, or `pinned_host`, host memory, from which each step
    fetches its rows. Use `pinned_host` for tables larger than an accelerator; the results are the same."""
    prefetch: bool = False
    """Whether the rows of the next batch are gathered while a step computes. For tables in host memory that
    tokens address (`engram`), in training on one device; the results are the same to the bit."""
    partition: Literal["slots", "width", "both"] = "slots"
    """Partition of tables over the devices of a mesh (`MeshConfig`): `slots`, rows over the mesh axis
    `memory`; `width`, columns over `memory`; `both`, rows over `memory` and columns over `width`. The results
    are the same up to the rounding of sums, which devices exchange in the model's dtype."""

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
        """Returns d_v + d_p, the numbers stored per slot."""
        return self.value_dim + self.pre_value_dim

    @property
    def arrays(self) -> dict[str, int]:
        """Returns the arrays of a table: name -> width of its rows."""
        widths = {"values": self.value_dim, "pre_values": self.pre_value_dim}
        return {name: width for name, width in widths.items() if width}

    @property
    def is_shared(self) -> bool:
        """Tells whether all memories of a config read one table."""
        return self.sharing != "none"

    def parameters(self, site: "MemorySite") -> dict[str, Parameter]:
        """Returns the dense parameters by name that products with pre-values need."""
        if not (self.pre_value_dim and self.project_pre_values):
            return {}
        shape = (site.context.embed_dim, self.pre_value_dim)
        return {"pre_projection": Parameter(shape, ("embed", None), "pre_projection")}
