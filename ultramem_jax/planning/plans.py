"""Chooses the runs that `plan` compares, by slots or by width and a baseline; compiles and estimates each."""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from ultramem_jax.config import RunConfig
from ultramem_jax.errors import choice, require
from ultramem_jax.planning.baseline import BASELINES, baseline_run, describe_baseline
from ultramem_jax.planning.compiled_step import DeviceBytes, compile_step
from ultramem_jax.planning.hardware import Hardware
from ultramem_jax.planning.partition import Costs, partition_costs
from ultramem_jax.planning.programs import abstract_axes
from ultramem_jax.planning.step_time import TimeEstimate, estimate_step
from ultramem_jax.planning.targets import Target
from ultramem_jax.planning.traffic import Traffic, by_axes, traffic

_LOGGER = logging.getLogger("ultramem_jax.plan")


@dataclass(frozen=True)
class Plan:
    """Holds one planned run: its config, its bytes, its traffic and its time."""

    name: str
    config: RunConfig
    bytes: DeviceBytes
    argument_bytes: int
    """Bytes of the compiled program's arguments, as the compiler counts them."""
    traffic: Sequence[Traffic]
    estimate: TimeEstimate
    note: str = ""
    compiler: str = ""
    """Compiler of temporaries and collectives, and its target; empty for the CPU's."""


def planned_runs(config: RunConfig, partitions: str, baseline: str) -> dict[str, tuple[RunConfig, str]]:
    """Returns the runs to plan, by name, each with a note.

    Args:
        config: the run; `resolved`.
        partitions: comma-separated ways to split tables; empty for that of the config.
        baseline: a system to plan beside it; empty for none.

    Raises:
        UserError: an unknown way or system, or one that does not go with the mesh.
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
        abstract_axes(run)  # raises for an impossible mesh before anything is compiled
    return runs


def make_plan(
    name: str, config: RunConfig, note: str, hardware: Hardware, target: Target | None = None
) -> Plan:
    """Compiles the step of one run and estimates its time.

    Args:
        name: name of the plan.
        config: the run; `resolved`.
        note: what there is to say about it.
        hardware: rates and sizes of the devices.
        target: the devices to compile for; None for simulated devices of the CPU.

    Raises:
        UserError: the target has no compiler here, or fewer devices.
    """
    _LOGGER.info("compiling %s", name)
    step = compile_step(config, target)
    rows = traffic(step)
    parameters = step.gathered_parameters
    estimate = estimate_step(config, step.axes, hardware, step.bytes, parameters, by_axes(rows))
    compiler = f"{target.compiler} for {target.name}" if target else ""
    return Plan(name, config, step.bytes, step.argument_bytes, rows, estimate, note, compiler)


def lookups(config: RunConfig, hardware: Hardware) -> tuple[int, Costs] | None:
    """Returns the tokens of a device, and the costs of a lookup for every P up to the number of devices.

    Returns None for a model without memories, and for one device.
    """
    axes = abstract_axes(config)
    if not config.model.sites or axes.mesh.size == 1:
        return None
    tokens = config.train.batch_size * config.data.seq_len // axes.size(axes.tokens)
    return tokens, partition_costs(config.model.sites[0], tokens, hardware, axes.mesh.size)
