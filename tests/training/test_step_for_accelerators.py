"""The step that accelerators get, with their algorithms, computes what the CPU's does: run here on CPU."""

from dataclasses import replace

import chex
import pytest

from tests.support.mesh_step import (
    MEMORY,
    TRAIN,
    TWO_AXES,
    V2,
    Compiled,
    after_steps,
    lowered,
    run,
    run_config,
)
from tests.support.step_models import FAMILY, MODEL, SMALL
from ultramem_jax.config import DataConfig, MeshConfig, MoEConfig, RunConfig
from ultramem_jax.ops.algorithms import choosing
from ultramem_jax.platforms import targeting
from ultramem_jax.presets import families

# A first step of Adam divides a gradient by its size. Where a gradient is the rounding of a sum, its sign is
# chance; this epsilon is larger than such gradients.
TRAIN = replace(TRAIN, eps=1e-4)
MEMORIES = FAMILY | {
    "ultramem": MEMORY,
    "peer": FAMILY["peer"].changed(placement="1:1"),
    "pkm": families.pkm(placement="1:1", **SMALL | dict(value_dim=16)),
    "engram": families.engram(placement="before@1", heads_per_order=2, rows_per_head=(50,), value_dim=4),
}
MOE = RunConfig(
    replace(MODEL, num_layers=1, memories={}, moe=MoEConfig(num_experts=8, expert_dim=8, top_k=2)),
    DataConfig(seq_len=16),
    TRAIN,
    MeshConfig(),
)


def _run_for(config, target, steps, alone, **ways):
    with targeting(target), choosing(**ways):
        step, abstract, axes = lowered(config, alone)
    return after_steps(config, Compiled(step.compile(), abstract, axes), steps)


def _assert_equal(config, target, steps=4, alone=True, **ways):
    expected, expected_losses, expected_metrics = run(config, steps, alone)
    state, losses, metrics = _run_for(config, target, steps, alone, **ways)
    chex.assert_trees_all_close(losses, expected_losses, rtol=2e-6)
    chex.assert_trees_all_close(metrics, expected_metrics, rtol=2e-4, atol=1e-6)
    for name in ("params", "tables"):
        chex.assert_trees_all_close(getattr(state, name), getattr(expected, name), rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(state.table_state, expected.table_state, rtol=1e-3, atol=1e-7)
    chex.assert_trees_all_equal(state.usage, expected.usage)


@pytest.mark.parametrize("target", ["gpu", "tpu"])
@pytest.mark.parametrize("name", sorted(MEMORIES))
def test_every_kind_of_memory(name, target):
    _assert_equal(run_config(MEMORIES[name], MeshConfig(), TRAIN), target)


@pytest.mark.parametrize("target", ["gpu", "tpu"])
def test_selected_rows(target):
    selecting = replace(TRAIN, slots_per_step=5, slot_score="reads")
    _assert_equal(run_config(MEMORY, MeshConfig(), selecting), target)


@pytest.mark.parametrize("target", ["gpu", "tpu"])
def test_experts(target):
    _assert_equal(MOE, target)


@pytest.mark.parametrize("target", ["gpu", "tpu"])
def test_chunks_of_tokens_and_rows(target):
    _assert_equal(run_config(MEMORY, MeshConfig(), TRAIN), target, chunk_values=3000)


@pytest.mark.parametrize("target", ["gpu", "tpu"])
@pytest.mark.parametrize(
    "memory, mesh, partition",
    [
        (MEMORY, MeshConfig(data=2, memory=4), "slots"),
        (MEMORY, MeshConfig(data=4, memory=2), "width"),
        (V2, TWO_AXES, "both"),
    ],
)
def test_meshes(memory, mesh, partition, target):
    _assert_equal(run_config(memory.changed(partition=partition), mesh, TRAIN), target, alone=False)


def test_a_step_for_accelerators_sorts_no_rows_and_adds_nothing_atomically():
    config = run_config(MEMORY, MeshConfig(), TRAIN)
    for target in ("gpu", "tpu"):
        with targeting(target):
            text = lowered(config, alone=True)[0].as_text()
        assert "top_k" not in text and "lapack" not in text
        scatters = [line for line in text.splitlines() if '"stablehlo.scatter"(' in line]
        assert scatters and all("unique_indices = true" in line for line in scatters)


def test_the_step_has_the_same_bits_in_every_run():
    config = run_config(MEMORY, MeshConfig(), TRAIN)
    first, second = (_run_for(config, "gpu", 3, True)[0] for _ in range(2))
    chex.assert_trees_all_equal(first, second)
