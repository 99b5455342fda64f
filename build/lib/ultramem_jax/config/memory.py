"""Configures a memory: its addresser, its table, its readout, and its places in a model.

`MemoryConfig` is the central config of this project, so it has a file of its own. The contract of its parts
is in `ultramem_jax.config.memory_parts`.
"""

import dataclasses
import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from ultramem_jax.config.field_types import Checked, Fields, FieldValue
from ultramem_jax.config.memory_kinds import ADDRESSERS, READOUTS
from ultramem_jax.config.memory_parts import (
    AddressConfig,
    MemoryInit,
    ModelContext,
    Parameter,
    ReadoutConfig,
    TableConfig,
    TableLayout,
    Window,
)
from ultramem_jax.config.placement import Span
from ultramem_jax.errors import unknown

T = TypeVar("T")

PARTS = ("address", "table", "readout")
"""Names of the fields of `MemoryConfig` that are configs themselves."""


@dataclass(frozen=True, kw_only=True)
class MemoryConfig(Checked):
    """Configures one or several memories of a model, which differ only in their places.

    `presets.families` has a function for each published memory: `ultramem`, `pkm`, `engram`, ...
    """

    PREFIX: ClassVar[str] = "memory."

    placement: str = "full"
    """Places of the memories (`config.placement`). UltraMem's change 4, "split big memory & skip"."""
    address: AddressConfig
    """Config of the addresser, which finds rows; its kind is in `memory_kinds.ADDRESSERS`."""
    table: TableConfig = field(default_factory=TableConfig)
    """Config of the table, which holds the rows."""
    readout: ReadoutConfig = field(default_factory=lambda: READOUTS["projection"]())
    """Config of the readout, which makes the output from pooled rows; its kind is in
    `memory_kinds.READOUTS`."""
    value_lr_multiple: float = 10.0
    """Multiple of the dense learning rate at which the rate of the table's rows starts (UltraMem's change 10:
    10; the authors' code and UltraMemV2: 4; Engram: 5)."""
    value_lr_final_multiple: float = 1.0
    """Multiple of the dense learning rate to which the rate of the table's rows falls, linearly, until the
    last step. Engram keeps its 5."""
    decay_values: bool = True
    """True if rows that were read decay, by `TrainConfig.weight_decay`. Engram's rows do not decay."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "value_lr_multiple", "value_lr_final_multiple")
        for part, kinds in (("address", ADDRESSERS), ("readout", READOUTS)):
            kind = getattr(self, part).kind
            if kind not in kinds.kinds():
                raise unknown(self.named(f"{part}.kind"), kind, kinds.kinds())
        weights = self.address.weights_per_read
        self.require(
            self.table.value_dim % weights == 0,
            "table.value_dim",
            f"must be a multiple of {weights}: each read has {weights} weights, one for a slice",
        )
        self.address.check(self)
        self.readout.check(self)

    @property
    def reads_per_token(self) -> int:
        """Returns R, the rows that a token reads in one memory."""
        return self.address.reads_per_token

    @property
    def num_blocks(self) -> int:
        """Returns the number of blocks that are pooled separately: E, or 1 if the readout sums the blocks."""
        return 1 if self.readout.sums_blocks else self.address.num_blocks

    @property
    def reads_apart(self) -> bool:
        """Tells whether every read is pooled by itself: read j is block j."""
        return self.address.reads_apart and not self.readout.sums_blocks

    @property
    def varying_weights(self) -> int:
        """Returns h, the weights of a read, or 0 if all weights are ones.

        Weights come from the addresser or from products with pre-values.
        """
        varies = self.address.weighs_reads or self.table.pre_value_dim > 0
        return self.address.weights_per_read if varies else 0

    def resized(self, num_slots: float) -> "MemoryConfig":
        """Returns the memory with the number of own slots that is nearest to `num_slots`."""
        near = self.address.near_slots(num_slots)
        best = min(near, key=lambda address: abs(address.own_slots - num_slots))
        return dataclasses.replace(self, address=best)

    def in_words(self) -> list[str]:
        """Returns short phrases that distinguish the memory from others, such as sizes and reads."""
        widths = {"d_v": self.table.value_dim, "d_p": self.table.pre_value_dim}
        words = [f"{name} {width}" for name, width in widths.items() if width]
        found, norms = self.address.in_words()
        return [*found, *words, f"{self.address.reads_in_words} reads", *norms, *self.readout.in_words()]

    def changed(self, **fields: FieldValue) -> "MemoryConfig":
        """Returns the config with some fields changed; a field of a part needs only its own name.

        Raises:
            UserError: no part has such a field, or a value is not allowed.
        """
        own: Fields = {}
        of_parts: dict[str, Fields] = {}
        for name, value in fields.items():
            *part, _ = self.find(name)
            (of_parts.setdefault(part[0], {}) if part else own)[name] = value
        parts = {name: dataclasses.replace(getattr(self, name), **of) for name, of in of_parts.items()}
        return dataclasses.replace(self, **own, **parts)

    def value_of(self, name: str) -> Any:
        """Returns the value of a field of the memory or of one of its parts."""
        return functools.reduce(getattr, self.find(name), self)

    def find(self, name: str) -> tuple[str, ...]:
        """Returns the path of a field, such as `("address", name)` or `(name,)`, given only its name.

        Raises:
            UserError: no part has such a field.
        """
        own = {one.name for one in dataclasses.fields(self)}
        if name in own:
            return (name,)
        of_parts = {part: {one.name for one in dataclasses.fields(getattr(self, part))} for part in PARTS}
        for part, names in of_parts.items():
            if name in names and name != "kind":
                return (part, name)
        raise unknown("field of a memory", name, own.union(*of_parts.values()) - {"kind"})


def memory_of(address: str, readout: str = "projection", **fields: FieldValue) -> MemoryConfig:
    """Returns a memory of two kinds; a field of one of its parts needs only its own name.

    Args:
        address: kind of the addresser, in `memory_kinds.ADDRESSERS`.
        readout: kind of the readout, in `memory_kinds.READOUTS`.
        fields: values for fields of `MemoryConfig`, of its table, and of these two kinds. All other fields
            have their defaults.

    Raises:
        UserError: an unknown kind or field, or a value that is not allowed.
    """
    kinds = {"address": ADDRESSERS[address], "table": TableConfig, "readout": READOUTS[readout]}
    values: dict[str, Fields] = {part: {} for part in kinds}
    known = {part: {one.name for one in dataclasses.fields(cls)} - {"kind"} for part, cls in kinds.items()}
    own: Fields = {
        one.name: fields.pop(one.name) for one in dataclasses.fields(MemoryConfig) if one.name in fields
    }
    for name, value in fields.items():
        part = next((part for part, names in known.items() if name in names), None)
        if part is None:
            raise unknown("field of a memory", name, set().union(*known.values()))
        values[part][name] = value
    return MemoryConfig(**{part: cls(**values[part]) for part, cls in kinds.items()}, **own)


@dataclass(frozen=True)
class MemorySite:
    """Describes one memory of a model (`ModelConfig.sites`), for code that counts, shards or builds it."""

    group: str
    """Name of the memory in `ModelConfig.memories`. All memories of a group have the same config."""
    index: int
    """Number of the memory within its group, from 0."""
    span: Span
    """Place of the memory among the layers."""
    config: MemoryConfig
    """Config of the memory."""
    context: ModelContext
    """Facts about the model that the memory depends on."""
    layout: TableLayout
    """Tables of the memories of the group, and the rows that each memory reads."""

    @classmethod
    def alone(
        cls,
        config: MemoryConfig,
        embed_dim: int,
        *,
        index: int = 0,
        num_memories: int = 1,
        group: str = "memory",
        **context: FieldValue,
    ) -> "MemorySite":
        """Returns a memory that belongs to no model, to be applied by itself.

        Args:
            config: config of the memory.
            embed_dim: D.
            index: number of the memory in its group, from 0.
            num_memories: M, memories of the group, for which the tables are made. They read in layers 1 to M.
            group: name of the group.
            context: other fields of `ModelContext`. The defaults are `num_layers` M, `vocab_size` 257,
                `inner_ratio` 4, `dtype` float32 and `norm_eps` 1e-5.

        Raises:
            UserError: the parts do not fit each other.
        """
        plain: Fields = dict(
            num_layers=num_memories, vocab_size=257, inner_ratio=4.0, dtype="float32", norm_eps=1e-5
        )
        starts = tuple(range(1, num_memories + 1))
        facts = ModelContext(embed_dim=embed_dim, starts=starts, **plain | context)
        span = Span(index + 1, index + 1)
        return cls(group, index, span, config, facts, config.address.layout(config, facts))

    @property
    def name(self) -> str:
        """Returns the name of the memory's module, under which it also sows its metrics."""
        return f"{self.group}_{self.index}"

    @property
    def table(self) -> str:
        """Returns the name of the module that holds its table: its own, or one that the group shares."""
        return f"{self.group}_tables" if self.config.table.is_shared else self.name

    @property
    def window(self) -> Window:
        """Returns the window of table rows that the memory can read."""
        return self.layout.windows[self.index]

    @property
    def num_slots(self) -> int:
        """Returns N, the rows of the memory's table."""
        return self.layout.num_slots[self.window.table]

    @property
    def parameters(self) -> dict[str, Parameter]:
        """Returns the memory's dense parameters by name."""
        config = self.config
        return _distinct(part.parameters(self) for part in (config.address, config.table, config.readout))

    @property
    def flops(self) -> int:
        """Returns the FLOPs of a token in products with dense parameters, two per weight and use."""
        return sum(parameter.flops for parameter in self.parameters.values())

    @property
    def lookup_flops(self) -> int:
        """Returns the FLOPs of a token's lookup: 2·R·(d_v + d_p), or 0 where nothing weighs or sums rows."""
        sums = self.config.varying_weights > 0 or self.config.readout.sums_blocks
        reads = self.config.reads_per_token if sums else 0
        return 2 * reads * self.config.table.row_dim

    @property
    def cache(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Returns the arrays that decoding keeps of each sequence: name -> shape without B, and dtype."""
        return _distinct((self.config.address.cache(self), self.config.readout.cache(self)))

    @property
    def initial(self) -> MemoryInit:
        """Returns the initialisation of the memory's table and readout."""
        return self.config.address.initial(self)


def _distinct(of_parts: Iterable[dict[str, T]]) -> dict[str, T]:
    """Merges the dicts of all parts. Names must differ, because the parts of a memory share a Flax scope."""
    found: dict[str, T] = {}
    for of_part in of_parts:
        for name in of_part.keys() & found.keys():
            raise ValueError(f"two parts of a memory have a {name!r}: kinds must take other names")
        found |= of_part
    return found
