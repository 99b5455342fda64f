"""Matches a Mixture of Experts to a model with memories: equal FLOPs and equal sparse parameters."""

import dataclasses

from ultramem_jax.baselines.matching import differences, match
from ultramem_jax.config import RunConfig

BASELINES = ("moe", "moe-fine")
"""Systems of `ultramem_jax.baselines.systems` whose experts can be split over the mesh."""


def baseline_run(config: RunConfig, system: str) -> RunConfig:
    """Returns the run of a matched Mixture of Experts on as many devices.

    The number of experts is rounded to a multiple of the devices that share them, with at least one expert
    per device. An axis `width` becomes part of `memory`.

    Args:
        config: run of a model with memories; its mesh is `resolved`.
        system: one of `BASELINES`.

    Raises:
        UserError: no such model matches, or its experts cannot be split.
    """
    model = match(config.model, system)
    assert model.moe is not None
    mesh = dataclasses.replace(config.mesh, memory=config.mesh.memory * config.mesh.width, width=1)
    experts = max(round(model.moe.num_experts / mesh.memory), 1) * mesh.memory
    moe = dataclasses.replace(model.moe, num_experts=experts)
    return dataclasses.replace(config, model=dataclasses.replace(model, moe=moe), mesh=mesh)


def describe_baseline(config: RunConfig, baseline: RunConfig) -> str:
    """Describes the shape of a baseline, and how far it is from the model with memories."""
    moe = baseline.model.moe
    assert moe is not None
    off = ", ".join(f"{name} {part:.1%}" for name, part in differences(config.model, baseline.model).items())
    return (
        f"{moe.num_experts:,} experts of width {moe.expert_dim:,} in each of {baseline.model.num_layers} "
        f"layers, {moe.top_k} per token; off the model with memories by: {off}"
    )
