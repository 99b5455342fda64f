"""The runs that `plan` plans: by slots or by width, and a baseline; each compiled and estimated."""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from ultramem_jax.config import RunConfig
from ultramem_jax.errors import choice, require
from ultramem_jax.planning.baseline import BASELINES, baseline_run, describe_baseline
from ultramem_jax.planning.compiled_step import DeviceBytes, abstract_axes, compile_step
from ultramem_jax.planning.hardware import Hardware
from ultramem_jax.planning.partition import Costs, partition_costs
from ultramem_jax.planning.step_time import TimeEstimate, estimate_step
from ultramem_jax.planning.traffic import Traffic, by_axes, traffic

_LOGGER = logging.getLogger("ultramem_jax.plan")


@dataclass(frozen=True)
class Plan:
    """Holds what is known of one planned run: all that its tables need, and its file keeps."""

    name: str
    config: RunConfig
    bytes: DeviceBytes
    argument_bytes: int
    """Of the compiled program, as the compiler counts them."""
    traffic: Sequence[Traffic]
    estimate: TimeEstimate
    note: str = ""


def planned_runs(config: RunConfig, partitions: str, baseline: str) -> dict[str, tuple[RunConfig, str]]:
    """The runs to plan, by name, with a note on each.

    Args:
        config: of the run; `resolved`.
        partitions: with commas between them; empty for that of the config.
        baseline: a system to stand beside it; empty for none.

    Raises:
        UserError: one that is unknown, or does not go with the mesh.
    """
    memory = config.model.memory
    runs: dict[str, tuple[RunConfig, str]] = {}
    if memory is None:
        require(not partitions, "--partition", partitions, "must be empty for a model without memories")
        runs["model"] = config, ""
    else:
        for name in partitions.split(",") if partitions else [memory.table.partition]:
            choice("--partition", name, ("slots", "width", "both"))
            model = config.model.with_memory(memory.changed(partition=name))
            runs[name] = dataclasses.replace(config, model=model), ""
    if baseline:
        choice("--baseline", baseline, BASELINES)
        other = baseline_run(config, baseline)
        runs[baseline] = other, describe_baseline(config, other)
    for run, _ in runs.values():
        abstract_axes(run)  # what cannot work is refused before anything is compiled
    return runs


def make_plan(name: str, config: RunConfig, note: str, hardware: Hardware) -> Plan:
    """Compiles and estimates one run."""
    _LOGGER.info("compiling %s", name)
    step = compile_step(config)
    rows = traffic(step)
    parameters = step.gathered_parameters
    estimate = estimate_step(config, step.axes, hardware, step.bytes, parameters, by_axes(rows))
    return Plan(name, config, step.bytes, step.argument_bytes, rows, estimate, note)


def lookups(config: RunConfig, hardware: Hardware) -> tuple[int, Costs] | None:
    """Tokens of a device, and what a lookup costs for every P up to the number of devices.

    None without memories, and for one device.
    """
    axes = abstract_axes(config)
    if not config.model.sites or axes.mesh.size == 1:
        return None
    tokens = config.train.batch_size * config.data.seq_len // axes.size(axes.tokens)
    return tokens, partition_costs(config.model.sites[0], tokens, hardware, axes.mesh.size)
