"""Who exchanges what in which sizes, as arithmetic: the layers make arrays of it, accounting counts them."""

import math
from collections.abc import Mapping

from ultramem_jax.config.run import RunConfig

_LARGEST_BYTE = 256


def block_bytes(expansion: int) -> int:
    """Bytes of a virtual block in [0, E) on its way between devices: none if there is one block."""
    if expansion == 1:
        return 0
    return 1 if expansion <= _LARGEST_BYTE else 4


def exchange_capacity(num_assignments: int, num_owners: int) -> int:
    """C: rows of one pair of devices in the first round of an exchange between experts.

    Four standard deviations above the mean load of a uniform router: a group has P² pairs, and one that
    exceeds C costs all of them a further round. More would be sent empty in every step (at a mean of 1024,
    four are 12 %), and would not do for a router that prefers some experts: against that, further rounds are
    small.

    Args:
        num_assignments: T·k of a device's own tokens.
        num_owners: P, devices that experts are split over.
    """
    mean = num_assignments / num_owners
    return min(math.ceil((mean + 4 * math.sqrt(mean)) / 4) * 4, num_assignments)


def overflow_capacity(capacity: int) -> int:
    """C': rows of one pair in a further round; a quarter, as an excess is mostly a small part of the load."""
    return -(-capacity // 4)


class AxisRoles:
    """What follows from which axes of a mesh split what; for classes that have these four as fields."""

    tokens: tuple[str, ...]
    slots: tuple[str, ...]
    width: tuple[str, ...]
    experts: tuple[str, ...]

    @property
    def owners(self) -> tuple[str, ...]:
        """Axes over which tables are split: a group along them holds each table once."""
        return self.slots + self.width

    @property
    def replicas(self) -> tuple[str, ...]:
        """Axes that split tokens and not tables: what tokens are split over after a gather to the owners."""
        return tuple(name for name in self.tokens if name not in self.owners)

    def of_tokens(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        """Those of `axes` that split tokens too."""
        return tuple(name for name in axes if name in self.tokens)


def axis_roles(config: RunConfig, sizes: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """The axes of a mesh that split `tokens`, `slots` and `width` of tables, and `experts`; major to minor.

    Args:
        config: of the run.
        sizes: devices along each axis; those with one are left out, and axes not named have one.
    """

    def larger(*names: str) -> tuple[str, ...]:
        return tuple(name for name in names if sizes.get(name, 1) > 1)

    # All memories of a model have one partition: `RunConfig` sees to it.
    partition = next((site.config.table.partition for site in config.model.sites), "none")
    return {
        "tokens": larger("data", "fsdp", *(("memory", "width") if config.mesh.batch_over_memory else ())),
        "slots": larger("memory") if partition in ("slots", "both") else (),
        "width": larger("memory") if partition == "width" else larger("width"),
        "experts": larger("memory") if config.model.moe is not None else (),
    }
