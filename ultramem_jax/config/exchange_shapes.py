"""Computes sizes of arrays that the layers make, or that devices exchange, also for accounting."""

import math
from collections.abc import Mapping

from ultramem_jax.config.run import RunConfig

_LARGEST_BYTE = 256

CAUSAL_CHUNKS = 4
"""Number of parts that the queries of a causal pass are cut into. A part leaves out the keys after its end,
3/8 of the scores in all. Forward and backward at B 16, S 256, A 4, d 32 on 2 CPU cores, float32: 21 ms with 4
parts, 29 with 2, 40 with 1; `jax.nn.dot_product_attention` takes 63."""


def block_bytes(expansion: int) -> int:
    """Returns the bytes that devices send for a block index in [0, E): 0 where there is only one block."""
    if expansion == 1:
        return 0
    return 1 if expansion <= _LARGEST_BYTE else 4


def exchange_capacity(num_assignments: int, num_owners: int) -> int:
    """Returns C, the rows of one pair of devices in the first round of an exchange between experts.

    C lies four standard deviations above the mean load of a uniform router. A group has P² pairs, and a
    single pair that exceeds C costs all of them a further round. A larger C would send more padding in every
    step: at a mean of 1024, four standard deviations are 12 %. It would also not suffice for a router that
    prefers some experts. Small further rounds (`overflow_capacity`) handle that case.

    Args:
        num_assignments: T·k of a device's own tokens.
        num_owners: P, devices that experts are split over.
    """
    mean = num_assignments / num_owners
    return min(math.ceil((mean + 4 * math.sqrt(mean)) / 4) * 4, num_assignments)


def overflow_capacity(capacity: int) -> int:
    """Returns C', the rows of one pair of devices in a further round of an exchange between experts.

    C' is a quarter of C, because the excess is mostly a small part of the load.
    """
    return -(-capacity // 4)


def group_rows(num_assignments: int, num_experts: int) -> int:
    """Returns Z, the rows of a group of assignments to one expert: a power of two, from 8 to 128.

    It is about half the mean load. Half a group of padding for every expert is then a quarter of the work.

    Args:
        num_assignments: T·k.
        num_experts: X.
    """
    half = max(num_assignments // (2 * num_experts), 1)
    return min(max(1 << (half.bit_length() - 1), 8), 128)


class AxisRoles:
    """Derives owners and replicas from the axes of a mesh, for classes that have these four as fields."""

    tokens: tuple[str, ...]
    """Mesh axes that split the tokens of a batch."""
    slots: tuple[str, ...]
    """Mesh axes that split the rows of tables."""
    width: tuple[str, ...]
    """Mesh axes that split the columns of tables."""
    experts: tuple[str, ...]
    """Mesh axes that split experts."""

    @property
    def owners(self) -> tuple[str, ...]:
        """Returns the axes over which tables are split: a group along them holds each table once."""
        return self.slots + self.width

    @property
    def replicas(self) -> tuple[str, ...]:
        """Returns the axes that split tokens but not tables.

        Tokens stay split over them after a gather to the owners.
        """
        return tuple(name for name in self.tokens if name not in self.owners)

    def of_tokens(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        """Returns those of `axes` that also split tokens."""
        return tuple(name for name in axes if name in self.tokens)


def axis_roles(config: RunConfig, sizes: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """Returns the mesh axes that split `tokens`, the `slots` and `width` of tables, and `experts`.

    Args:
        config: the run.
        sizes: devices along each axis. The result leaves out axes of one device. An axis that is not named
            has one device.

    Returns:
        role -> axes, from major to minor.
    """

    def larger(*names: str) -> tuple[str, ...]:
        return tuple(name for name in names if sizes.get(name, 1) > 1)

    # All memories of a model have one partition: `RunConfig` checks that.
    partition = next((site.config.table.partition for site in config.model.sites), "none")
    return {
        "tokens": larger("data", "fsdp", *(("memory", "width") if config.mesh.batch_over_memory else ())),
        "slots": larger("memory") if partition in ("slots", "both") else (),
        "width": larger("memory") if partition == "width" else larger("width"),
        "experts": larger("memory") if config.model.moe is not None else (),
    }
