"""The members of the family that came after UltraMem: UltraMemV2, Memory+ and PEER, and what they added."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import oracle
from tests.support.memory_cases import assert_close_to_float64, case, layer
from ultramem_jax.config.memory import MemorySite
from ultramem_jax.presets import families

SMALL = dict(num_keys=6, top_m=4, key_dim=8)
V2 = SMALL | dict(value_dim=8, pre_value_dim=6)
PLUS = SMALL | dict(num_heads=2, value_dim=8)
PEER = SMALL | dict(value_dim=16, pre_value_dim=16)
FOUR_BLOCKS = dict(query_per_rank=True, pre_value_activation="gelu", expansion=4)
MEMBERS = {
    "v2": families.ultramem_v2(**V2),
    "v2, query per rank, gelu, 4 blocks summed": families.ultramem_v2(**V2, **FOUR_BLOCKS),
    "v2, blocks not summed": families.ultramem_v2(**V2, expansion=4, sum_blocks=False),
    "v2, 2 heads, query conv": families.ultramem_v2(**V2, num_heads=2, query_conv_width=3),
    "v2, own queries per rank": families.ultramem_v2(
        **V2, num_heads=2, share_query=False, query_per_rank=True, tucker_rank=3
    ),
    "v2, rank 1, no pre-values": families.ultramem_v2(**V2 | dict(pre_value_dim=0), tucker_rank=1),
    "memory+": families.memory_plus(**PLUS),
    "memory+, plain keys": families.memory_plus(**PLUS, norm_keys=False),
    "memory+, query conv": families.memory_plus(**PLUS, query_conv_width=3),
    "peer, 2 heads": families.peer(**PEER, num_heads=2),
    "peer, 4 heads": families.peer(**PEER, num_heads=4),
}


@functools.cache
def member(name):
    return case(MEMBERS[name])


@pytest.mark.parametrize("name", MEMBERS)
def test_equals_the_definition_in_float64(name):
    assert_close_to_float64(member(name).run(), member(name).expected())


def test_parameters_are_those_of_the_member():
    # D 16, d_k 8, r 2, h 2; two memories of 6 keys a side share 72 slots, √72 = 8.5: windows of 8·8.
    plain, blocks, plus, peer = (
        jax.tree.map(jnp.shape, member(name).variables["params"])
        for name in ("v2", "v2, query per rank, gelu, 4 blocks summed", "memory+", "peer, 4 heads")
    )
    assert plain == {
        "query": (16, 2 * 8),
        "query_scale": (8,),
        "keys": (2, 1, 2, 8, 8),
        "key_scale": (8,),
        "cores": (1, 2, 2, 2),
        "pre_projection": (16, 6),
        "projection": (8, 16),
    }
    # A query for each of two ranks; 2·8 virtual keys; one projector for the sum of four blocks.
    assert blocks == plain | {"query": (16, 2 * 2 * 8), "keys": (2, 1, 2, 2 * 8, 8)}
    assert plus == {
        "query": (16, 2 * 2 * 8),
        "query_scale": (8,),
        "keys": (2, 2, 1, 6, 8),
        "key_scale": (8,),
        "gate": (16, 8),
        "projection": (8, 16),
    }
    # Four queries, one set of keys.
    assert peer == {"query": (16, 2 * 4 * 8), "query_scale": (8,), "keys": (2, 1, 1, 6, 8)}


def test_one_expert_of_inner_width_one_by_hand():
    # One key per side, so the softmax weighs the only slot with 1. D 2, x = (2, -1), u = (1, 1), v = (3, 5):
    # u·x = 1, GELU(1) = (1 + erf(1/√2))/2 = 0.8413447, y = 0.8413447·(3, 5).
    config = families.peer(
        num_keys=1, top_m=1, num_heads=1, key_dim=2, value_dim=2, pre_value_dim=2, norm_query=False
    )
    params = {"query": jnp.ones((2, 4)), "keys": jnp.ones((2, 1, 1, 1, 2))}
    tables = {"values": jnp.asarray([[3.0, 5.0]]), "pre_values": jnp.ones((1, 2))}
    module, x = layer(config, 2, num_layers=1), jnp.asarray([[[2.0, -1.0]]])
    y = jax.jit(lambda v, x: module.apply(v, x, train=False))({"params": params, "memory": tables}, x)
    chex.assert_trees_all_close(y, np.array([[[3 * 0.8413447, 5 * 0.8413447]]]), rtol=1e-6)


def test_a_gate_by_hand():
    # The only slot holds (3, 5). x = (2, -1), gates W·x with W = ((1, 0), (2, 1)): (2 - 2, -1) = (0, -1);
    # SiLU(0) = 0, SiLU(-1) = -1/(1 + e) = -0.2689414. Projected by the identity: (0, -1.344707).
    config = families.memory_plus(
        num_keys=1, top_m=1, num_heads=1, key_dim=2, value_dim=2, norm_query=False, norm_keys=False
    )
    params = {
        "query": jnp.ones((2, 4)),
        "keys": jnp.ones((2, 1, 1, 1, 2)),
        "gate": jnp.asarray([[1.0, 0.0], [2.0, 1.0]]),
        "projection": jnp.eye(2),
    }
    tables = {"values": jnp.asarray([[3.0, 5.0]])}
    module, x = layer(config, 2, num_layers=1), jnp.asarray([[[2.0, -1.0]]])
    y = jax.jit(lambda p, x: module.apply({"params": p}, x, train=False, tables=tables))(params, x)
    chex.assert_trees_all_close(y, np.array([[[0.0, -1.344707]]]), rtol=1e-6)


# What a memory may read, worked out by hand. A ring of 3 memories with 6 keys a side has 3·36 = 108 slots.
# Whole: √108 = 10.4, windows of 10·10 = 100; memory 2 starts at 72: rows 72..107, then 0..63.
# Half: √54 = 7.3, windows of 49: 72..107, then 0..12.
# Four memories in halves have 144 slots, √72 = 8.5, windows of 64; memory 3 is of the second half: 72..135.
# Where all read one table, it has the 36 slots of one memory.
WINDOWS = {
    "whole ring": (dict(sharing="ring"), 3, 2, 108, {*range(72, 108), *range(64)}),
    "half a ring": (dict(sharing="ring", share_ratio=0.5), 3, 2, 108, {*range(72, 108), *range(13)}),
    "blocks": (dict(sharing="blocks", share_ratio=0.5), 4, 3, 144, {*range(72, 136)}),
    "all": (dict(sharing="all"), 3, 2, 36, {*range(36)}),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_of_a_shared_table(name):
    sharing, num_memories, index, num_slots, window = WINDOWS[name]
    config = families.ultramem_v2(**V2, **sharing)
    memory = case(config, num_memories, index)
    assert "memory" not in memory.variables
    chex.assert_shape(memory.tables["values"], (num_slots, 8))
    chex.assert_shape(memory.tables["pre_values"], (num_slots, 6))
    assert_close_to_float64(memory.run(), memory.expected())
    # Many tokens read the whole window and nothing else.
    x = jax.random.normal(jax.random.key(9), (1, 1000, 16))
    slots = _slots_read(memory, x)
    assert slots <= window and len(slots) > 0.9 * len(window)


def _slots_read(memory, x):
    def reads(variables, x, tables):
        return memory.module.apply(variables, x, train=False, tables=tables, mutable=["reads"])[1]["reads"]

    return set(np.unique(jax.jit(reads)(memory.variables, x, memory.tables)["slots"]).tolist())


def test_neighbours_in_a_ring_overlap_as_their_share_says():
    # Rings of 3 memories with 36 slots each, share 1/2, windows of 49: memory 0 reads 0..48, memory 1
    # 36..84, memory 2 72..107 and 0..12. Neighbours have 13 rows in common.
    memory = families.ultramem_v2(**V2, share_ratio=0.5)
    layout = MemorySite.alone(memory, 16, num_memories=3).layout
    windows = [{(w.first + a) % 108 for a in range(w.size)} for w in layout.windows]
    assert [len(windows[i] & windows[(i + 1) % 3]) for i in range(3)] == [13, 13, 13]


def test_memories_of_a_ring_shuffle_differently_even_with_one_block():
    # With shares of 1/3 the windows do not overlap; their order within the window differs too.
    config = families.ultramem_v2(**V2, share_ratio=1 / 3)
    memory = case(config, num_memories=3, index=0)

    def slots(index):
        module = layer(config, 16, num_memories=3, index=index)
        apply = jax.jit(
            lambda *args: module.apply(args[0], args[1], train=False, tables=args[2], mutable=["reads"])
        )
        return np.asarray(apply(memory.variables, memory.x, memory.tables)[1]["reads"]["slots"])

    assert (slots(0) < 36).all() and ((slots(1) >= 36) & (slots(1) < 72)).all()
    assert (slots(0) != slots(1) - 36).mean() > 0.8


def _directional(function, arrays, name, step=1e-6):
    """Derivative of `function` in a random direction of the array `name`, and that direction."""
    direction = np.random.default_rng(len(name)).standard_normal(arrays[name].shape)
    ahead, behind = (function(arrays | {name: arrays[name] + s * direction}) for s in (step, -step))
    return (ahead - behind) / (2 * step), direction


@pytest.mark.parametrize("name", ["v2, query per rank, gelu, 4 blocks summed", "memory+"])
def test_gradients_equal_finite_differences_of_the_definition(name):
    memory = member(name)
    cotangent = np.random.default_rng(0).standard_normal(memory.x.shape)
    split = memory.module.site.config, memory.variables, memory.tables

    def assemble(arrays):
        config, variables, tables = split
        params = {key: arrays[key] for key in variables["params"]}
        return config, variables | {"params": params}, {key: arrays[key] for key in tables}

    def expected_loss(arrays):
        x = arrays["x"]
        config, variables, tables = assemble(arrays)
        return (oracle.memory_layer(config, variables, x, memory.cell(), tables) * cotangent).sum()

    def loss(arrays):
        _, variables, tables = assemble(arrays)
        y = memory.module.apply(variables, arrays["x"], train=True, tables=tables)
        return (y * jnp.asarray(cotangent, jnp.float32)).sum()

    arrays = dict(memory.variables["params"]) | memory.tables | {"x": memory.x}
    gradients = jax.jit(jax.grad(loss))(arrays)
    exact = oracle.float64(arrays)
    scale = np.sqrt(np.mean([float((g**2).mean()) for g in gradients.values()]))
    for key, gradient in gradients.items():
        slope, direction = _directional(expected_loss, exact, key)
        found = (np.asarray(gradient, np.float64) * direction).sum()
        assert found == pytest.approx(slope, rel=1e-3, abs=1e-4 * scale), key


BALANCED = {
    "product keys": families.memory_plus(**PLUS, balance_loss_weight=0.5),
    "common keys": families.peer(**PEER, num_heads=3, balance_loss_weight=0.5),
    "tucker": families.ultramem_v2(**V2, num_heads=2, balance_loss_weight=0.5),
}


def _sown_losses(memory):
    def apply(params, variables, x, tables):
        variables = variables | {"params": params}
        return memory.module.apply(variables, x, train=True, tables=tables, mutable=["losses"])[1]["losses"]

    return lambda params: jax.jit(apply)(params, memory.variables, memory.x, memory.tables)


@pytest.mark.parametrize("name", BALANCED)
def test_balance_loss_equals_its_definition(name):
    memory = case(BALANCED[name])
    x = np.asarray(memory.x, np.float64)
    expected = oracle.balance_loss(memory.module.site.config, memory.variables, x)
    assert abs(expected - 2) > 0.01  # not that of uniform use
    assert float(_sown_losses(memory)(memory.variables["params"])["balance"]) == pytest.approx(
        0.5 * expected, rel=1e-5
    )


def test_balance_loss_reaches_queries_and_keys_only_through_the_probabilities():
    memory = case(BALANCED["tucker"])
    losses = _sown_losses(memory)
    params = memory.variables["params"]
    gradients = jax.grad(lambda params: losses(params)["balance"])(params)
    exact = oracle.float64(params)

    # Shares do not change in a small step, and u and t are those of the cores, which are not in this.
    def expected_loss(arrays):
        variables = memory.variables | {"params": arrays}
        return 0.5 * oracle.balance_loss(
            memory.module.site.config, variables, np.asarray(memory.x, np.float64)
        )

    for name in ("query", "keys", "query_scale", "key_scale"):
        slope, direction = _directional(expected_loss, exact, name)
        found = (np.asarray(gradients[name], np.float64) * direction).sum()
        assert abs(slope) > 1e-4
        assert found == pytest.approx(slope, rel=1e-3, abs=1e-6), name
    assert not gradients["cores"].any() and not gradients["projection"].any()


def test_balance_loss_of_uniform_use_is_one_for_each_side():
    # Without a query all scores are 0, p_i = 1/K, and K·Σ f_i·p_i = Σ f_i = 1 whatever was chosen.
    memory = case(BALANCED["product keys"])
    params = memory.variables["params"] | {"query": jnp.zeros((16, 32))}
    assert float(_sown_losses(memory)(params)["balance"]) == pytest.approx(0.5 * 2, rel=1e-6)


def test_balance_loss_by_hand():
    # Two keys a side, one candidate; x and the query are 1. Rows score (ln 3, 0) and columns (0, ln 4):
    # p = (3, 1)/4 with f = (1, 0): 2·3/4; p = (1, 4)/5 with f = (0, 1): 2·4/5. In all 3.1, times β = 10.
    config = families.pkm(num_keys=2, top_m=1, num_heads=1, key_dim=1, value_dim=1, balance_loss_weight=10.0)
    keys = jnp.log(jnp.asarray([[3.0, 1.0], [1.0, 4.0]])).reshape(2, 1, 1, 2, 1)
    variables = {"params": {"query": jnp.ones((1, 2)), "keys": keys}, "memory": {"values": jnp.ones((4, 1))}}
    module = layer(config, 2, num_layers=1)
    _, sown = jax.jit(lambda v, x: module.apply(v, x, train=True, mutable=["losses"]))(
        variables, jnp.ones((1, 1, 1))
    )
    assert float(sown["losses"]["balance"]) == pytest.approx(31.0, rel=1e-6)


def test_balance_loss_is_absent_when_off():
    memory = member("memory+")

    def sown(x):
        return memory.module.apply(memory.variables, x, train=True, tables=memory.tables, mutable=["losses"])[
            1
        ]

    assert "losses" not in jax.eval_shape(sown, memory.x)
