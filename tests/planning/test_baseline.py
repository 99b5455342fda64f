"""A baseline on the devices of a plan."""

import dataclasses

from ultramem_jax import MeshConfig, RunConfig
from ultramem_jax.planning.baseline import baseline_run, describe_baseline
from ultramem_jax.presets import preset


def test_the_experts_of_a_baseline_divide_over_the_devices():
    config = RunConfig(preset("ultramem-tiny"), mesh=MeshConfig(data=1, memory=4))
    baseline = baseline_run(config, "moe")
    moe = baseline.model.moe
    # The match has 34 experts of width 376.
    assert (moe.num_experts, moe.expert_dim, baseline.mesh.memory) == (32, 376, 4)
    words = describe_baseline(config, baseline)
    assert "32 experts of width 376" in words and "sparse parameters 6." in words
    memory = config.model.memory.changed(partition="both")
    both = RunConfig(
        dataclasses.replace(config.model, memories={"memory": memory}),
        mesh=MeshConfig(data=1, memory=2, width=8),
    )
    assert baseline_run(both, "moe").mesh == MeshConfig(data=1, memory=16)
