import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import oracle
from ultramem_jax.config import MemoryConfig
from ultramem_jax.layers import ProductKeyMemory
from ultramem_jax.layers.memory.initializers import draw_table
from ultramem_jax.ops import addressing

SMALL = dict(num_keys=6, top_m=4, num_heads=2, key_dim=8, value_dim=8)
CONFIGS = {
    "pkm": MemoryConfig.pkm(**SMALL | dict(value_dim=16)),
    "without softmax": MemoryConfig.pkm(**SMALL | dict(value_dim=16), softmax=False),
    "projected": MemoryConfig.pkm(**SMALL, project_values=True),
    "shared query": MemoryConfig.pkm(**SMALL, project_values=True, share_query=True),
    "normed": MemoryConfig.pkm(**SMALL, project_values=True, norm_query_key=True),
    "expanded": MemoryConfig.pkm(**SMALL, project_values=True, expansion=4),
    "convolved": MemoryConfig.pkm(**SMALL, project_values=True, query_conv_width=3),
    "rank 1": MemoryConfig.ultramem(**SMALL, tucker_rank=1),
    "ultramem": MemoryConfig.ultramem(**SMALL),
    "full keys, rank 3, 4 cores": MemoryConfig.ultramem(
        **SMALL, tucker_rank=3, num_cores=4, rank_keys="full", expansion=9, init="reference"
    ),
    "own queries": MemoryConfig.ultramem(**SMALL, share_query=False, shuffle="none"),
    "stored permutation": MemoryConfig.ultramem(**SMALL, shuffle="explicit"),
}


def _layer(config, seed=0, dtype=jnp.float32, num_layers=4):
    """Module, variables of no special values, and x."""
    module = ProductKeyMemory(config, num_layers, index=1, dtype=dtype)
    x = jax.random.normal(jax.random.key(seed + 1), (2, 5, 16))
    made = module.init(jax.random.key(seed), x, train=False)
    variables = {name: dict(made[name]) for name in ("params", "memory", "buffers") if name in made}
    rng = np.random.default_rng(seed)
    for name in ("query_scale", "key_scale", "query_conv"):
        if name in variables["params"]:
            shape = variables["params"][name].shape
            variables["params"][name] = jnp.asarray(rng.uniform(0.5, 1.5, shape), jnp.float32)
    if config.shuffle == "explicit":
        permutation = rng.permutation(config.expansion * config.num_slots)
        variables["buffers"]["permutation"] = jnp.asarray(permutation, jnp.int32)
    return module, variables, x


def _addressing(config, variables):
    """(row, column) -> (block, slot) as the layer with index 1 has it."""
    size = config.num_virtual_keys
    rows, columns = np.divmod(np.arange(size * size, dtype=np.int32), size)
    if config.shuffle == "explicit":
        address = np.asarray(variables["buffers"]["permutation"])
        blocks, slots = np.divmod(address, config.num_slots)
    elif config.shuffle == "none" or config.expansion == 1:
        blocks, slots = addressing.block_and_slot(rows, columns, config.num_keys, config.expansion)
    else:
        blocks, slots = addressing.shuffled_block_and_slot(
            jnp.asarray(rows), jnp.asarray(columns), config.num_keys, config.expansion, seed=1
        )
    return lambda i, j: (int(blocks[i * size + j]), int(slots[i * size + j]))


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_definition_in_float64(name):
    config = CONFIGS[name]
    module, variables, x = _layer(config)
    y = jax.jit(lambda v, x: module.apply(v, x, train=False))(variables, x)
    expected = oracle.memory_layer(
        config, variables, np.asarray(x, np.float64), _addressing(config, variables)
    )
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5 * expected.std())


def test_all_switches_on_is_ultramem_and_all_off_is_pkm():
    pkm = MemoryConfig.pkm(value_dim=128)
    assert pkm.softmax and not pkm.project_values and not pkm.share_query and not pkm.norm_query_key
    assert pkm.expansion == pkm.num_cores == 1 and pkm.tucker_rank == pkm.query_conv_width == 0
    every_switch = dict(
        softmax=False,
        project_values=True,
        share_query=True,
        norm_query_key=True,
        expansion=4,
        tucker_rank=2,
        num_cores=2,
        init="paper",
        value_lr_multiple=10.0,
        query_conv_width=4,
    )
    assert MemoryConfig.pkm(value_dim=64, **every_switch) == MemoryConfig.ultramem(value_dim=64)


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
    config = MemoryConfig.ultramem(**dict(num_keys=64, top_m=16, key_dim=64, value_dim=64) | switches)
    module = ProductKeyMemory(config, num_layers)
    x = jax.random.normal(jax.random.key(1), (4, 64, 128))
    # The core is drawn anew with every seed and sets the scale of all scores: the promise is of the mean.
    variance = np.mean(
        [
            module.init_with_output(jax.random.key(seed), x, train=False)[0].var()
            for seed in range(8 if config.tucker_rank else 2)
        ]
    )
    assert variance * 2 * num_layers == pytest.approx(1.0, rel=0.25)


@pytest.mark.parametrize("rank", [0, 2])
def test_product_key_initialisation_with_norms_scores_near_one(rank):
    config = MemoryConfig.pkm(
        num_keys=64, top_m=16, key_dim=64, value_dim=64, softmax=False, norm_query_key=True, tucker_rank=rank
    )
    module = ProductKeyMemory(config, 12)
    x = jax.random.normal(jax.random.key(1), (2, 32, 64))
    variables = module.init(jax.random.key(0), x, train=False)
    scores = module.apply(variables, x, train=False, mutable=["reads"])[1]["reads"]["scores"]
    # The best of 64 + 64 standard normal scores, summed or multiplied under a core: some units, not d_k.
    assert 1 < float(jnp.sqrt((scores**2).mean())) < 12


def test_initialisation_returns_what_apply_takes():
    module, _, x = _layer(CONFIGS["stored permutation"])
    made = module.init(jax.random.key(0), x, train=False)
    assert set(made) == {"params", "memory", "buffers"}
    assert module.apply(made, x[:1], train=False).shape == (1, 5, 16)  # another batch than that of init
    permutation = np.asarray(made["buffers"]["permutation"])
    np.testing.assert_array_equal(np.sort(permutation), np.arange(4 * 36))
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
    module, variables, x = _layer(config)
    y, sown = module.apply(variables, x, train=True, mutable=["reads"])
    reads = sown["reads"]
    assert reads["slots"].shape == reads["blocks"].shape == (10, 8) and reads["scores"].shape == (10, 8, 2)
    table, projection = variables["memory"]["values"], variables["params"]["projection"]
    pooled = np.zeros((10, 4, 8))
    for t in range(10):
        for j in range(8):
            weight = np.repeat(reads["scores"][t, j], 4)
            pooled[t, reads["blocks"][t, j]] += table[reads["slots"][t, j]] * weight
    np.testing.assert_allclose(y.reshape(10, -1), pooled.reshape(10, -1) @ projection, rtol=1e-4, atol=1e-5)


def test_rank_one_vectors_follow_the_core_in_training_only():
    module, variables, x = _layer(CONFIGS["ultramem"])
    assert not variables["buffers"]["row_direction"].any()  # from zeros, like the authors' buffers
    _, left = module.apply(variables, x, train=True, mutable=["buffers"])
    direction = left["buffers"]["row_direction"]
    np.testing.assert_allclose((direction**2).sum(-1), 1.0, rtol=1e-5)
    # With the other sign in the buffers, the layer keeps to the other sign and reads other cells.
    mirrored = variables | {"buffers": jax.tree.map(jnp.negative, left["buffers"])}
    _, again = module.apply(mirrored, x, train=True, mutable=["buffers"])
    np.testing.assert_allclose(again["buffers"]["row_direction"], -direction, rtol=1e-5)
    assert not jnp.array_equal(
        module.apply(mirrored, x, train=False), module.apply(variables, x, train=False)
    )


def test_auxiliary_loss_is_weighted_and_absent_when_off():
    module, variables, x = _layer(MemoryConfig.ultramem(**SMALL, core_loss_weight=0.5, core_loss_margin=0.0))
    _, sown = module.apply(variables, x, train=True, mutable=["losses"])
    minor = np.linalg.svd(np.asarray(variables["params"]["cores"]).sum(1), compute_uv=False)[:, 1]
    np.testing.assert_allclose(sown["losses"]["core"], 0.5 * (minor**2).mean(), rtol=1e-4)
    module, variables, x = _layer(MemoryConfig.ultramem(**SMALL, core_loss_weight=0.0))
    assert "losses" not in module.apply(variables, x, train=True, mutable=["losses"])[1]


def test_metrics_are_what_they_say():
    module, variables, x = _layer(CONFIGS["ultramem"])
    y, sown = module.apply(variables, x, train=True, mutable=["metrics", "reads"])
    metrics = {name: float(value) for name, value in sown["metrics"].items()}
    total = np.asarray(sown["reads"]["scores"]).sum(-1).reshape(10, 2, 4)
    assert metrics["top_1_score"] == pytest.approx(total[..., 0].mean(), rel=1e-5)
    assert metrics["top_m_score"] == pytest.approx(total[..., -1].mean(), rel=1e-5)
    assert metrics["output_std"] == pytest.approx(float(y.std()), rel=1e-5)
    values = np.linalg.svd(np.asarray(variables["params"]["cores"]).sum(1), compute_uv=False).mean(0)
    assert metrics["core_singular_value_1"] == pytest.approx(values[0], rel=1e-4)
    assert metrics["core_singular_value_2"] == pytest.approx(values[1], rel=1e-4)


def test_memories_of_a_model_shuffle_differently():
    config = CONFIGS["ultramem"]
    _, variables, x = _layer(config)
    reads = [
        ProductKeyMemory(config, 4, index).apply(variables, x, train=False, mutable=["reads"])[1]["reads"]
        for index in (0, 1)
    ]
    np.testing.assert_array_equal(reads[0]["scores"], reads[1]["scores"])
    assert (reads[0]["slots"] != reads[1]["slots"]).mean() > 0.8


def test_query_convolution_is_causal_and_starts_as_the_identity():
    off = MemoryConfig.ultramem(**SMALL, query_conv_width=0)
    on = MemoryConfig.ultramem(**SMALL, query_conv_width=3)
    module, _, x = _layer(on)
    variables = module.init(jax.random.key(0), x, train=False)
    without = {"params": {k: v for k, v in variables["params"].items() if k != "query_conv"}}
    y = module.apply(variables, x, train=False)
    np.testing.assert_array_equal(
        y, ProductKeyMemory(off, 4, index=1).apply(dict(variables) | without, x, train=False)
    )
    module, variables, x = _layer(on)
    later = x.at[:, 3:].set(jax.random.normal(jax.random.key(9), (2, 2, 16)))
    before, after = module.apply(variables, x, train=False), module.apply(variables, later, train=False)
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert (before[:, 3:] != after[:, 3:]).any()


def test_query_gain_is_deterministic_and_scales_as_it_says():
    from ultramem_jax.layers.memory.initializers import memory_init, query_gain

    config = MemoryConfig.ultramem(num_keys=64, key_dim=32, value_dim=32)
    assert query_gain(config) == memory_init(config, 128, 4).query_gain
    assert memory_init(config, 128, 4).key_gain == pytest.approx(1 / math.sqrt(32))
    assert memory_init(config, 128, 4).values_std == pytest.approx(math.sqrt(4 / (2 * 16 * 2 * 4)))
    # Full-width keys score √2 as high per rank, a Tucker score is a product of two: half the squared gain.
    full = MemoryConfig.ultramem(num_keys=64, key_dim=32, value_dim=32, rank_keys="full")
    assert query_gain(full) ** 2 == pytest.approx(query_gain(config) ** 2 / 2, rel=1e-6)
