import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.memory_cases import assert_close_to_float64, case, layer
from ultramem_jax.config.memory import MemorySite
from ultramem_jax.layers.memory.initializers import chosen_scores, memory_init, retrieval_init
from ultramem_jax.layers.memory.table import draw_table
from ultramem_jax.presets import families

SMALL = dict(num_keys=6, top_m=4, num_heads=2, key_dim=8, value_dim=8)
CONFIGS = {
    "pkm": families.pkm(**SMALL | dict(value_dim=16)),
    "without softmax": families.pkm(**SMALL | dict(value_dim=16), softmax=False),
    "projected": families.pkm(**SMALL, project_values=True),
    "shared query": families.pkm(**SMALL, project_values=True, share_query=True),
    "normed": families.pkm(**SMALL, project_values=True, norm_query=True, norm_keys=True),
    "normed queries": families.pkm(**SMALL, project_values=True, norm_query=True),
    "normed keys": families.pkm(**SMALL, project_values=True, norm_keys=True),
    "expanded": families.pkm(**SMALL, project_values=True, expansion=4),
    "convolved": families.pkm(**SMALL, project_values=True, query_conv_width=3),
    "rank 1": families.ultramem(**SMALL, tucker_rank=1),
    "ultramem": families.ultramem(**SMALL),
    "full keys, rank 3, 4 cores": families.ultramem(
        **SMALL, tucker_rank=3, num_cores=4, rank_keys="full", expansion=9, init="reference"
    ),
    "own queries": families.ultramem(**SMALL, share_query=False, shuffle="none"),
    "stored permutation": families.ultramem(**SMALL, shuffle="explicit"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_definition_in_float64(name):
    memory = case(CONFIGS[name])
    assert_close_to_float64(memory.run(), memory.expected())


def test_all_switches_on_is_ultramem_and_all_off_is_pkm():
    pkm = families.pkm(value_dim=128)
    address = pkm.address
    assert address.softmax and not pkm.readout.project_values and not address.share_query
    assert not address.norm_query and not address.norm_keys
    assert address.expansion == address.num_cores == 1
    assert address.tucker_rank == address.query_conv_width == 0
    every_switch = dict(
        softmax=False,
        project_values=True,
        share_query=True,
        norm_query=True,
        norm_keys=True,
        expansion=4,
        tucker_rank=2,
        num_cores=2,
        init="paper",
        value_lr_multiple=10.0,
        query_conv_width=4,
    )
    assert families.pkm(value_dim=64, **every_switch) == families.ultramem(value_dim=64)


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"rank_keys": "full"},
        {"tucker_rank": 3, "num_cores": 4, "key_dim": 48},
        {"tucker_rank": 0, "num_cores": 1, "expansion": 1},
    ],
)
@pytest.mark.parametrize("num_layers", [4, 24])
def test_output_variance_starts_at_one_over_two_layers(switches, num_layers):
    config = families.ultramem(**dict(num_keys=64, top_m=16, key_dim=64, value_dim=64) | switches)
    module = layer(config, 128, num_layers=num_layers)
    x = jax.random.normal(jax.random.key(1), (4, 64, 128))
    variance_of = jax.jit(lambda key: module.init_with_output(key, x, train=False)[0].var())
    # The core is drawn anew with every seed and sets the scale of all scores: the promise is of the mean.
    variance = np.mean(
        [variance_of(jax.random.key(s)) for s in range(8 if config.address.tucker_rank else 2)]
    )
    assert variance * 2 * num_layers == pytest.approx(1.0, rel=0.25)


@pytest.mark.parametrize("rank", [0, 2])
def test_product_key_initialisation_with_norms_scores_near_one(rank):
    norms = dict(norm_query=True, norm_keys=True)
    config = families.pkm(
        num_keys=64, top_m=16, key_dim=64, value_dim=64, softmax=False, tucker_rank=rank, **norms
    )
    module = layer(config, 64, num_layers=12)
    x = jax.random.normal(jax.random.key(1), (2, 32, 64))

    def scores_of(key):
        variables = module.init(key, x, train=False)
        return module.apply(variables, x, train=False, mutable=["reads"])[1]["reads"]["weights"]

    scores = jax.jit(scores_of)(jax.random.key(0))
    # The best of 64 + 64 standard normal scores, summed or multiplied under a core: some units, not d_k.
    assert 1 < float(jnp.sqrt((scores**2).mean())) < 12


def test_initialisation_returns_what_apply_takes():
    module, _, x, _ = case(CONFIGS["stored permutation"])
    made = jax.jit(lambda x: module.init(jax.random.key(0), x, train=False))(x)
    assert set(made) == {"params", "memory", "buffers"}
    # Another batch than that of init.
    y = jax.eval_shape(lambda made: module.apply(made, x[:1], train=False), made)
    chex.assert_shape(y, (1, 5, 16))
    permutation = np.asarray(made["buffers"]["permutation"])
    chex.assert_trees_all_equal(np.sort(permutation), np.arange(4 * 36))
    assert (permutation != np.arange(4 * 36)).mean() > 0.9


def test_table_is_drawn_in_blocks_with_the_right_spread():
    # 2²⁰ values are one block: this is one and a part of another.
    table = draw_table(jax.random.key(0), (1 << 16) + 1000, 16, 0.5)
    assert table.std() == pytest.approx(0.5, rel=0.01) and abs(table.mean()) < 0.005
    assert len(np.unique(table[:, 0])) > 0.95 * len(table)
    for part in (table[:1000], table[-1000:]):
        assert part.std() == pytest.approx(0.5, rel=0.05)


def test_reads_are_recorded_as_they_were_used():
    config = CONFIGS["ultramem"]
    module, variables, x, _ = case(config)
    y, sown = jax.jit(lambda v, x: module.apply(v, x, train=True, mutable=["reads"]))(variables, x)
    reads = jax.tree.map(np.asarray, sown["reads"])
    chex.assert_shape([reads["slots"], reads["blocks"]], (10, 8))
    chex.assert_shape(reads["weights"], (10, 8, 2))
    table, projection = np.asarray(variables["memory"]["values"]), variables["params"]["projection"]
    pooled = np.zeros((10, 4, 8))
    for t in range(10):
        for j in range(8):
            weight = np.repeat(reads["weights"][t, j], 4)
            pooled[t, reads["blocks"][t, j]] += table[reads["slots"][t, j]] * weight
    chex.assert_trees_all_close(y.reshape(10, -1), pooled.reshape(10, -1) @ projection, rtol=1e-4, atol=1e-5)


def test_rank_one_vectors_follow_the_core_in_training_only():
    module, _, x, _ = case(CONFIGS["ultramem"])
    variables = dict(module.init(jax.random.key(0), x, train=False))
    assert not variables["buffers"]["row_direction"].any()  # from zeros, like the authors' buffers
    _, left = module.apply(variables, x, train=True, mutable=["buffers"])
    direction = left["buffers"]["row_direction"]
    chex.assert_trees_all_close((direction**2).sum(-1), 1.0, rtol=1e-5)
    # With the other sign in the buffers, the layer keeps to the other sign and reads other cells.
    mirrored = variables | {"buffers": jax.tree.map(jnp.negative, left["buffers"])}
    _, again = module.apply(mirrored, x, train=True, mutable=["buffers"])
    chex.assert_trees_all_close(again["buffers"]["row_direction"], -direction, rtol=1e-5)
    assert not jnp.array_equal(
        module.apply(mirrored, x, train=False), module.apply(variables, x, train=False)
    )


def test_auxiliary_loss_is_weighted_and_absent_when_off():
    module, variables, x, _ = case(families.ultramem(**SMALL, core_loss_weight=0.5, core_loss_margin=0.0))
    _, sown = module.apply(variables, x, train=True, mutable=["losses"])
    minor = np.linalg.svd(np.asarray(variables["params"]["cores"]).sum(1), compute_uv=False)[:, 1]
    chex.assert_trees_all_close(sown["losses"]["core"], 0.5 * (minor**2).mean(), rtol=1e-4)
    module, variables, x, _ = case(families.ultramem(**SMALL, core_loss_weight=0.0))
    assert "losses" not in module.apply(variables, x, train=True, mutable=["losses"])[1]


def test_metrics_are_what_they_say():
    module, variables, x, _ = case(CONFIGS["ultramem"])
    y, sown = module.apply(variables, x, train=True, mutable=["metrics", "reads"])
    metrics = {name: float(value) for name, value in sown["metrics"].items()}
    total = np.asarray(sown["reads"]["weights"]).sum(-1).reshape(10, 2, 4)
    assert metrics["top_1_score"] == pytest.approx(total[..., 0].mean(), rel=1e-5)
    assert metrics["top_m_score"] == pytest.approx(total[..., -1].mean(), rel=1e-5)
    assert metrics["output_std"] == pytest.approx(float(y.std()), rel=1e-5)
    values = np.linalg.svd(np.asarray(variables["params"]["cores"]).sum(1), compute_uv=False).mean(0)
    assert metrics["core_singular_value_1"] == pytest.approx(values[0], rel=1e-4)
    assert metrics["core_singular_value_2"] == pytest.approx(values[1], rel=1e-4)


def test_memories_of_a_model_shuffle_differently():
    config = CONFIGS["ultramem"]
    _, variables, x, _ = case(config)
    modules = [layer(config, 16, index=index, num_memories=2) for index in (0, 1)]
    reads = [m.apply(variables, x, train=False, mutable=["reads"])[1]["reads"] for m in modules]
    chex.assert_trees_all_equal(reads[0]["weights"], reads[1]["weights"])
    assert (reads[0]["slots"] != reads[1]["slots"]).mean() > 0.8


def test_query_convolution_is_causal_and_starts_as_the_identity():
    off = families.ultramem(**SMALL, query_conv_width=0)
    on = families.ultramem(**SMALL, query_conv_width=3)
    module, _, x, _ = case(on)
    variables = module.init(jax.random.key(0), x, train=False)
    without = {"params": {k: v for k, v in variables["params"].items() if k != "query_conv"}}
    y = module.apply(variables, x, train=False)
    plain = layer(off, 16, index=1, num_memories=2)
    chex.assert_trees_all_equal(y, plain.apply(dict(variables) | without, x, train=False))
    module, variables, x, _ = case(on)
    later = x.at[:, 3:].set(jax.random.normal(jax.random.key(9), (2, 2, 16)))
    before, after = module.apply(variables, x, train=False), module.apply(variables, later, train=False)
    chex.assert_trees_all_equal(before[:, :3], after[:, :3])
    assert (before[:, 3:] != after[:, 3:]).any()


def test_query_gain_is_deterministic_and_scales_as_it_says():
    def started(config):
        return retrieval_init(MemorySite.alone(config, 128, num_layers=4))

    def scores(config):
        return chosen_scores(config.address, 128)

    config = families.ultramem(num_keys=64, key_dim=32, value_dim=32)
    assert started(config).query_gain == scores(config).mean_square ** -0.25
    chosen_scores.cache_clear()
    assert started(config).query_gain == scores(config).mean_square ** -0.25
    assert started(config).key_gain == pytest.approx(1 / math.sqrt(32))
    assert memory_init(MemorySite.alone(config, 128, num_layers=4)).values_std == pytest.approx(
        math.sqrt(4 / (2 * 16 * 2 * 4))
    )
    # Full-width keys score √2 as high per rank, a Tucker score is a product of two: half the squared gain.
    full = families.ultramem(num_keys=64, key_dim=32, value_dim=32, rank_keys="full")
    assert started(full).query_gain ** 2 == pytest.approx(started(config).query_gain ** 2 / 2, rel=1e-6)
