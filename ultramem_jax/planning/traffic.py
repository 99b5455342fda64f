"""Sums what devices send each other in a compiled step, by purpose, beside what formulas predict."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ultramem_jax.accounting import Transfer, step_transfers
from ultramem_jax.accounting.model import FLOAT32_BYTES
from ultramem_jax.config import RunConfig
from ultramem_jax.config import exchange_purposes as purposes
from ultramem_jax.ops.exchanges import purposes_of
from ultramem_jax.ops.on_mesh import MeshAxes
from ultramem_jax.parallel.collectives import Collective
from ultramem_jax.planning.compiled_step import CompiledStep
from ultramem_jax.planning.programs import mesh_sizes


@dataclass(frozen=True)
class Traffic:
    """Sums the collectives of one purpose, kind and group of axes; a device sends these bytes in a step."""

    purpose: str
    kind: str
    axes: tuple[str, ...]
    group_size: int | None
    """Devices of the largest group; None if the program has no such collective."""
    times: int | None
    """Runs of the collectives in a step; None in a loop whose length depends on the data."""
    compiled_bytes: int | None
    """Bytes by the program; None if it has no such collective. Loops count with the expected passes."""
    formula_bytes: float | None
    """Bytes by the formula; None if there is none."""

    @property
    def sent_bytes(self) -> float:
        """Returns bytes for estimates: by the formula, in the model's dtype, or else by the program."""
        return self.formula_bytes if self.formula_bytes is not None else float(self.compiled_bytes or 0)


def purpose(collective: Collective) -> str:
    """Returns what a collective of a training step is for.

    An exchange of ours carries its purpose in its name (`ultramem_jax.ops.exchanges`). The compiler adds the
    others, for dense layers: their purpose follows from kind, axes and pass.

    Args:
        collective: a collective of a program of `make_train_step`.
    """
    if named := purposes_of(collective.op_name):
        # A few bytes of metrics may travel with what they are joined to.
        return " and ".join(name for name in named if name != purposes.LOSSES_AND_METRICS) or named[0]
    if "tensor" in collective.axes:
        return purposes.SUMS_OVER_TENSOR
    if collective.axes == ("fsdp",) and collective.kind == "all-gather":
        return purposes.PARAMETERS_FOR_THE_STEP
    # JAX names the operations of the backward pass so.
    backward = "transpose(" in collective.op_name
    return purposes.GRADIENTS_OF_PARAMETERS if backward else purposes.LOSSES_AND_METRICS


def traffic(step: CompiledStep) -> list[Traffic]:
    """Returns the collectives of a compiled step beside their formulas, those that send most first."""
    config = step.config
    transfers = step_transfers(config, mesh_sizes(config.mesh))
    reads = reads_at_owner(config, step.axes)
    return grouped(step.collectives, transfers, reads)


def grouped(
    collectives: Iterable[Collective],
    transfers: Iterable[Transfer],
    reads: float = 0,
) -> list[Traffic]:
    """Groups collectives and transfers by purpose, kind and axes.

    Args:
        collectives: collectives of a program.
        transfers: the formulas, from `step_transfers`.
        reads: reads of the rows that one device owns, in a step; they give the length of loops over them.
    """
    found: dict[tuple[str, str, tuple[str, ...]], list[Collective]] = {}
    for collective in collectives:
        key = purpose(collective), collective.kind, collective.axes
        found.setdefault(key, []).append(collective)
    formulas: dict[tuple[str, str, tuple[str, ...]], float] = {}
    for transfer in transfers:
        key = transfer.name, transfer.kind, transfer.axes
        formulas[key] = formulas.get(key, 0) + transfer.moved_bytes
    rows = [_row(key, found.get(key, []), formulas.get(key), reads) for key in found | formulas]
    return sorted(rows, key=lambda row: -row.sent_bytes)


def by_axes(rows: Iterable[Traffic]) -> Mapping[tuple[str, ...], float]:
    """Returns the bytes that a device sends along each group of axes, for estimates."""
    total: dict[tuple[str, ...], float] = {}
    for row in rows:
        total[row.axes] = total.get(row.axes, 0) + row.sent_bytes
    return total


def reads_at_owner(config: RunConfig, axes: MeshAxes) -> float:
    """Returns the mean reads of one device's rows in a step and memory, if reads are spread evenly."""
    sites = config.model.sites
    if not sites:
        return 0.0
    tokens = config.train.batch_size * config.data.seq_len
    reads = sum(site.config.reads_per_token for site in sites) / len(sites)
    return tokens * reads / axes.size(axes.slots)


def _row(
    key: tuple[str, str, tuple[str, ...]], collectives: list[Collective], formula: float | None, reads: float
) -> Traffic:
    if not collectives:
        return Traffic(*key, None, None, None, formula)
    counted = all(collective.trips_known for collective in collectives)
    return Traffic(
        *key,
        max(collective.group_size for collective in collectives),
        sum(collective.loop_trip_count for collective in collectives) if counted else None,
        round(sum(_sent(collective, key[0], reads) for collective in collectives)),
        formula,
    )


def _sent(collective: Collective, name: str, reads: float) -> float:
    if collective.trips_known:
        return collective.total_bytes
    if name == purposes.MEANS_OVER_COLUMNS:  # a float32 for every read of a chunk
        return collective.moved_bytes * -(-reads // (collective.operand_bytes // FLOAT32_BYTES))
    # Groups beyond the capacity of an expert: none if the load is balanced.
    return 0 if name == purposes.OVERFLOW_OF_EXPERTS else collective.total_bytes
