"""Puts a memory together: its addresser, its table and its readout, and where it sits in a model.

`MemoryConfig` is part of `ultramem_jax.config`; it has a file of its own because it is the subject of this
project. What its parts must answer is in `ultramem_jax.config.memory_parts`.
"""

import dataclasses
import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from ultramem_jax.config.field_types import Checked
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
"""Fields of `MemoryConfig` that are configs of their own."""


@dataclass(frozen=True, kw_only=True)
class MemoryConfig(Checked):
    """Configures one or several memories of a model, which differ only in where they sit.

    `presets.families` has a function for each published member: `ultramem`, `pkm`, `engram`, ...
    """

    PREFIX: ClassVar[str] = "memory."

    placement: str = "full"
    """Where the memories sit (`config.placement`). UltraMem's change 4, "split big memory & skip"."""
    address: AddressConfig
    """How rows are found; of a kind in `memory_kinds.ADDRESSERS`."""
    table: TableConfig = field(default_factory=TableConfig)
    """The rows."""
    readout: ReadoutConfig = field(default_factory=lambda: READOUTS["projection"]())
    """What is made of the rows; of a kind in `memory_kinds.READOUTS`."""
    value_lr_multiple: float = 10.0
    """The learning rate of the table's rows starts at this multiple of the dense one (UltraMem's change 10:
    10; the authors' code and UltraMemV2: 4; Engram: 5) ..."""
    value_lr_final_multiple: float = 1.0
    """... and falls linearly to this one at the last step. Engram keeps its 5."""
    decay_values: bool = True
    """Whether rows that were read decay, by `TrainConfig.weight_decay`; Engram's do not."""

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
        """R."""
        return self.address.reads_per_token

    @property
    def num_blocks(self) -> int:
        """Blocks that are pooled apart from each other: E, or 1 if they are summed."""
        return 1 if self.readout.sums_blocks else self.address.num_blocks

    @property
    def reads_apart(self) -> bool:
        """Whether every read is pooled alone: read j is block j."""
        return self.address.reads_apart and not self.readout.sums_blocks

    @property
    def varying_weights(self) -> int:
        """h, weights of a read, from the addresser or products with pre-values; 0 where all are ones."""
        varies = self.address.weighs_reads or self.table.pre_value_dim > 0
        return self.address.weights_per_read if varies else 0

    def resized(self, num_slots: float) -> "MemoryConfig":
        """Returns the memory whose own slots are nearest to that many."""
        near = self.address.near_slots(num_slots)
        best = min(near, key=lambda address: abs(address.own_slots - num_slots))
        return dataclasses.replace(self, address=best)

    def in_words(self) -> list[str]:
        """Returns what tells the memory from others, in a few words."""
        widths = {"d_v": self.table.value_dim, "d_p": self.table.pre_value_dim}
        words = [f"{name} {width}" for name, width in widths.items() if width]
        found, norms = self.address.in_words()
        return [*found, *words, f"{self.address.reads_in_words} reads", *norms, *self.readout.in_words()]

    def changed(self, **fields: Any) -> "MemoryConfig":
        """Returns the config with fields changed, each by its name alone, whichever part has it.

        Raises:
            UserError: no part has such a field, or a value is not allowed.
        """
        own: dict[str, Any] = {}
        of_parts: dict[str, dict[str, Any]] = {}
        for name, value in fields.items():
            *part, _ = self.find(name)
            (of_parts.setdefault(part[0], {}) if part else own)[name] = value
        parts = {name: dataclasses.replace(getattr(self, name), **of) for name, of in of_parts.items()}
        return dataclasses.replace(self, **own, **parts)

    def value_of(self, name: str) -> Any:
        """Returns the value of a field, whichever part has it."""
        return functools.reduce(getattr, self.find(name), self)

    def find(self, name: str) -> tuple[str, ...]:
        """Returns the path of a field, `("address", name)` or `(name,)`, from its name alone.

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


def memory_of(address: str, readout: str = "projection", **fields: Any) -> MemoryConfig:
    """Returns a memory of the kinds named, with fields of its parts given by their names alone.

    Args:
        address: kind, of `memory_kinds.ADDRESSERS`.
        readout: kind, of `memory_kinds.READOUTS`.
        fields: of `MemoryConfig`, of the table, and of these two kinds; others are as by default.

    Raises:
        UserError: an unknown kind or field, or a value that is not allowed.
    """
    kinds = {"address": ADDRESSERS[address], "table": TableConfig, "readout": READOUTS[readout]}
    values: dict[str, dict[str, Any]] = {part: {} for part in kinds}
    known = {part: {one.name for one in dataclasses.fields(cls)} - {"kind"} for part, cls in kinds.items()}
    own = {one.name: fields.pop(one.name) for one in dataclasses.fields(MemoryConfig) if one.name in fields}
    for name, value in fields.items():
        part = next((part for part, names in known.items() if name in names), None)
        if part is None:
            raise unknown("field of a memory", name, set().union(*known.values()))
        values[part][name] = value
    return MemoryConfig(**{part: cls(**values[part]) for part, cls in kinds.items()}, **own)


@dataclass(frozen=True)
class MemorySite:
    """Stands for one memory of a model (`ModelConfig.sites`): all that counts, shards or makes it asks it."""

    group: str
    """Its name in `ModelConfig.memories`; memories of one group have one config."""
    index: int
    """Its number within the group, from 0."""
    span: Span
    config: MemoryConfig
    context: ModelContext
    layout: TableLayout

    @classmethod
    def alone(
        cls,
        config: MemoryConfig,
        embed_dim: int,
        *,
        index: int = 0,
        num_memories: int = 1,
        group: str = "memory",
        **context: Any,
    ) -> "MemorySite":
        """Returns a memory that is in no model, to be applied by itself.

        Args:
            config: of the memory.
            embed_dim: D.
            index: its number, of
            num_memories: M, memories that the tables are made for. They read in layers 1 to M.
            group: its name.
            context: fields of `ModelContext`: `num_layers` (M), `vocab_size` (257), `inner_ratio` (4), `dtype`
                (float32) and `norm_eps` (1e-5), with what they are by default.

        Raises:
            UserError: the parts do not fit each other.
        """
        plain: dict[str, Any] = dict(
            num_layers=num_memories, vocab_size=257, inner_ratio=4.0, dtype="float32", norm_eps=1e-5
        )
        starts = tuple(range(1, num_memories + 1))
        facts = ModelContext(embed_dim=embed_dim, starts=starts, **plain | context)
        span = Span(index + 1, index + 1)
        return cls(group, index, span, config, facts, config.address.layout(config, facts))

    @property
    def name(self) -> str:
        """The name of its module, and of what it sows."""
        return f"{self.group}_{self.index}"

    @property
    def table(self) -> str:
        """The name of the module whose table it reads: its own, or one that the group shares."""
        return f"{self.group}_tables" if self.config.table.is_shared else self.name

    @property
    def window(self) -> Window:
        """The rows that it can reach."""
        return self.layout.windows[self.index]

    @property
    def num_slots(self) -> int:
        """N of its table."""
        return self.layout.num_slots[self.window.table]

    @property
    def parameters(self) -> dict[str, Parameter]:
        """Its dense parameters by name."""
        config = self.config
        return _distinct(part.parameters(self) for part in (config.address, config.table, config.readout))

    @property
    def flops(self) -> int:
        """FLOPs of a token in products with its parameters, two per weight and use."""
        return sum(parameter.flops for parameter in self.parameters.values())

    @property
    def lookup_flops(self) -> int:
        """FLOPs of a token's lookup: 2·R·(d_v + d_p), or 0 where rows are taken as they are."""
        sums = self.config.varying_weights > 0 or self.config.readout.sums_blocks
        reads = self.config.reads_per_token if sums else 0
        return 2 * reads * self.config.table.row_dim

    @property
    def cache(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """What decoding remembers of a sequence: name -> shape behind B, and dtype."""
        return _distinct((self.config.address.cache(self), self.config.readout.cache(self)))

    @property
    def initial(self) -> MemoryInit:
        """How its table and readout start."""
        return self.config.address.initial(self)


def _distinct(of_parts: Iterable[dict[str, T]]) -> dict[str, T]:
    """Returns the dicts of all parts as one; names must differ, as the parts of a memory share a scope."""
    found: dict[str, T] = {}
    for of_part in of_parts:
        for name in of_part.keys() & found.keys():
            raise ValueError(f"two parts of a memory have a {name!r}: kinds must take other names")
        found |= of_part
    return found
