"""What devices send each other in a compiled step, by purpose, beside what formulas say."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ultramem_jax.accounting import Transfer, step_transfers
from ultramem_jax.accounting.model import FLOAT32_BYTES
from ultramem_jax.config import RunConfig
from ultramem_jax.ops.on_mesh import MeshAxes
from ultramem_jax.parallel.collectives import Collective
from ultramem_jax.planning.compiled_step import CompiledStep, mesh_sizes

MEANS = "means over the columns of rows"
OVERFLOW = "overflow of experts"
_EXPERTS = "tokens to experts and back"
_TO_EXPERTS = ("tokens to experts", "results to tokens")
"""Two purposes of the formulas whose collectives have one name in the program."""
_MEMORY = re.compile(r"/(address|table|readout)[./]")
"""Modules of a memory."""

_OF_POOLED = {
    # (whether in the backward pass, whether it adds numbers of reads) -> purpose
    (False, False): "pooled sums to tokens",
    (True, True): "score gradients to tokens",
    (True, False): "cotangents to owners",
}


@dataclass(frozen=True)
class Traffic:
    """Collectives of one purpose, kind and group of axes. Bytes are what a device sends in a step."""

    purpose: str
    kind: str
    axes: tuple[str, ...]
    group_size: int | None
    """Devices of a group; None if the program has no such collective."""
    times: int | None
    """Runs in a step; None where this is how often a loop's body runs, which depends on the data."""
    compiled_bytes: int | None
    """None if the program has no such collective; of loops, with the number of passes that is expected."""
    formula_bytes: float | None
    """None if there is no formula for it."""

    @property
    def sent_bytes(self) -> float:
        """For estimates: the formula's, which is in the model's dtype, or else the program's."""
        return self.formula_bytes if self.formula_bytes is not None else float(self.compiled_bytes or 0)


def purpose(collective: Collective, tokens_apart: bool = True) -> str:
    """What a collective of a training step is for, by the names in JAX's path to it.

    Args:
        collective: of a program of `make_train_step`.
        tokens_apart: `MeshConfig.batch_over_memory`: whether the owners of a table have tokens of their own.
    """
    path, kind, axes = collective.op_name, collective.kind, collective.axes
    backward = "transpose(" in path
    # The compiler joins collectives, and their paths by colons; written by hand are those in islands alone.
    if not all("shard_map/" in part for part in path.split(":")):
        return _of_dense_layers(kind, axes, backward)
    if _MEMORY.search(path):
        return _of_memory(path, kind, axes, backward, tokens_apart)
    if "feed_forward/" in path:
        return _of_experts(path, kind, axes)
    if path.endswith("/while/body/psum"):
        return MEANS
    return "reads and cotangents to replicas" if kind == "all-gather" else "losses and metrics"


def _of_dense_layers(kind: str, axes: tuple[str, ...], backward: bool) -> str:
    if "tensor" in axes:
        return "activations over tensor"
    if axes == ("fsdp",) and kind == "all-gather":
        return "parameters for the step"
    return "gradients of parameters" if backward else "losses and metrics"


def _of_memory(path: str, kind: str, axes: tuple[str, ...], backward: bool, tokens_apart: bool) -> str:
    gather, adds = kind == "all-gather", kind in ("reduce-scatter", "all-reduce")
    if backward and kind == "all-reduce" and {"memory", "width"}.isdisjoint(axes):
        return "gradients of tables"
    if "._activations/" in path:
        if backward:
            numbers = gather and tokens_apart
            return "cotangents of products to owners" if numbers else "gradients of inputs to tokens"
        return "products to tokens" if adds else "inputs of pre-values to owners"
    if "._pooled/" not in path:
        # Not only what was read: the gradient of the keys is a sum over tokens, made in an island too.
        return "reads to owners" if gather else _of_dense_layers(kind, axes, backward)
    if gather and not backward and tokens_apart:
        return "scores to owners"
    return _OF_POOLED[backward, adds and backward]


def _of_experts(path: str, kind: str, axes: tuple[str, ...]) -> str:
    if "/while/" in path:
        return OVERFLOW
    if kind == "all-to-all":
        return "loads of experts" if path.endswith("/shard_map/all_to_all") else _EXPERTS
    if "psum" not in path:
        return "losses and metrics"
    return "gradients of experts" if {"memory", "tensor"}.isdisjoint(axes) else "sums over experts"


def traffic(step: CompiledStep) -> list[Traffic]:
    """The collectives of a compiled step beside their formulas, those that send most first."""
    config = step.config
    transfers = step_transfers(config, mesh_sizes(config.mesh))
    reads = reads_at_owner(config, step.axes)
    return grouped(step.collectives, transfers, config.mesh.batch_over_memory, reads)


def grouped(
    collectives: Iterable[Collective],
    transfers: Iterable[Transfer],
    tokens_apart: bool = True,
    reads: float = 0,
) -> list[Traffic]:
    """Collectives and transfers of the same purpose, kind and axes, put together.

    Args:
        collectives: of a program.
        transfers: of `step_transfers`.
        tokens_apart: see `purpose`.
        reads: of the tables in a step, of those rows that one device owns; for the length of loops over them.
    """
    found: dict[tuple[str, str, tuple[str, ...]], list[Collective]] = {}
    for collective in collectives:
        key = purpose(collective, tokens_apart), collective.kind, collective.axes
        found.setdefault(key, []).append(collective)
    formulas: dict[tuple[str, str, tuple[str, ...]], float] = {}
    for transfer in transfers:
        name = _EXPERTS if transfer.name in _TO_EXPERTS else transfer.name
        key = name, transfer.kind, transfer.axes
        formulas[key] = formulas.get(key, 0) + transfer.moved_bytes
    rows = [_row(key, found.get(key, []), formulas.get(key), reads) for key in found | formulas]
    return sorted(rows, key=lambda row: -row.sent_bytes)


def by_axes(rows: Iterable[Traffic]) -> Mapping[tuple[str, ...], float]:
    """Bytes that a device sends along each group of axes, for estimates."""
    total: dict[tuple[str, ...], float] = {}
    for row in rows:
        total[row.axes] = total.get(row.axes, 0) + row.sent_bytes
    return total


def reads_at_owner(config: RunConfig, axes: MeshAxes) -> float:
    """Reads of a memory, on average, in a step that are of one device's rows, if they are spread evenly."""
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
    if name == MEANS:  # a float32 for every read of a chunk
        return collective.moved_bytes * -(-reads // (collective.operand_bytes // FLOAT32_BYTES))
    # Blocks beyond the room of an expert: none if the load is balanced.
    return 0 if name == OVERFLOW else collective.total_bytes
