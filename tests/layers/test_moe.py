import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.activations import gelu64, silu64
from ultramem_jax import ModelConfig, MoEConfig
from ultramem_jax.layers.moe import (
    ExpertWeights,
    MoE,
    block_experts,
    block_shape,
    dispatch_plan,
    ragged_experts,
    route,
)
from ultramem_jax.layers.served_experts import block_rows, served_experts
from ultramem_jax.models import Transformer
from ultramem_jax.ops.linear import OutputMajor

T, D, F, NUM_EXPERTS = 24, 6, 8, 4
RNG = np.random.default_rng(0)
TOKENS = RNG.normal(size=(T, D)).astype(np.float32)


def model(implementation="blocks", dtype="float32", **fields):
    sizes = dict(num_experts=NUM_EXPERTS, expert_dim=F) | fields
    moe = MoEConfig(implementation=implementation, **sizes)
    return ModelConfig(embed_dim=D, num_heads=1, num_kv_heads=1, dtype=dtype, moe=moe)


def expert_weights(activation):
    def draw(*shape):
        return RNG.normal(size=shape).astype(np.float32)

    gate = draw(NUM_EXPERTS, D, F) if activation == "swiglu" else None
    return ExpertWeights(draw(NUM_EXPERTS, D, F), draw(NUM_EXPERTS, F, D), gate)


def moe64(x, gates, experts, weights):
    """Definition: a loop over tokens and their experts, in float64."""
    x, gates = np.asarray(x, np.float64), np.asarray(gates, np.float64)
    w_in, w_out, w_gate = (None if w is None else np.asarray(w, np.float64) for w in weights)
    y = np.zeros_like(x)
    for t in range(len(x)):
        for gate, expert in zip(gates[t], np.asarray(experts)[t], strict=True):
            inner = x[t] @ w_in[expert]
            inner = gelu64(inner) if w_gate is None else silu64(x[t] @ w_gate[expert]) * inner
            y[t] += gate * (inner @ w_out[expert])
    return y


def dense(x, gates, experts, weights):
    """Every token through every expert, weighted by one-hot gates: plain products that JAX differentiates."""
    one_hot = jax.nn.one_hot(experts, NUM_EXPERTS, dtype=jnp.float32)
    share = jnp.einsum("tk,tkx->tx", gates, one_hot)
    inner = jnp.einsum("td,xdf->xtf", x, weights.w_in)
    if weights.w_gate is None:
        inner = jax.nn.gelu(inner)
    else:
        inner = jax.nn.silu(jnp.einsum("td,xdf->xtf", x, weights.w_gate)) * inner
    return jnp.einsum("xtf,xfd,tx->td", inner, weights.w_out, share)


def chosen(loads, k):
    """Experts (T, k): `even`, `skewed` (most on expert 2, none on 3) or `one` (all tokens on the same k)."""
    if loads == "one":
        return np.tile((np.arange(k, dtype=np.int32) + 2) % NUM_EXPERTS, (T, 1))
    bias = np.array([0.0, 0.0, 2.0, -9.0]) if loads == "skewed" else np.zeros(NUM_EXPERTS)
    return np.argsort(-(bias + RNG.gumbel(size=(T, NUM_EXPERTS))), axis=1)[:, :k].astype(np.int32)


SHAPES = {"chosen": None, "loop of single rows": (0, 1), "slots and blocks": (4, 3), "all in slots": (T, 1)}
IMPLEMENTATIONS = {"ragged": ragged_experts} | {
    name: lambda *args, shape=shape: block_experts(*args, shape) for name, shape in SHAPES.items()
}


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_outputs_and_gradients_at_every_load(name, activation):
    weights = expert_weights(activation)
    probe = RNG.normal(size=(T, D)).astype(np.float32)

    def loss(x, gates, weights, experts):
        y = IMPLEMENTATIONS[name](x, gates, weights, dispatch_plan(experts, NUM_EXPERTS))
        return jnp.sum(y * probe), y

    def oracle_loss(x, gates, weights, experts):
        return jnp.sum(dense(x, gates, experts, weights) * probe)

    ours = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    oracle = jax.jit(jax.grad(oracle_loss, argnums=(0, 1, 2)))
    for k in (1, 2) if activation == "gelu" else (2,):
        gates = RNG.uniform(0.1, 1.0, size=(T, k)).astype(np.float32)
        for loads in ("even", "skewed", "one"):
            experts = chosen(loads, k)
            (_, y), gradients = ours(TOKENS, gates, weights, experts)
            chex.assert_trees_all_close(y, moe64(TOKENS, gates, experts, weights), rtol=2e-5, atol=2e-5)
            expected = oracle(TOKENS, gates, weights, experts)
            chex.assert_trees_all_close(gradients, expected, rtol=2e-5, atol=1e-4)


def test_plan_hand_worked():
    # Assignments 0..5 of three tokens go to experts 2 0 | 0 2 | 2 1: expert 0 has assignments 1 and 2,
    # expert 1 has 5, expert 2 has 0, 3, 4; expert 3 has none.
    plan = jax.jit(dispatch_plan, static_argnums=1)(jnp.asarray([[2, 0], [0, 2], [2, 1]], jnp.int32), 4)
    chex.assert_trees_all_equal(plan.order, np.array([1, 2, 5, 0, 3, 4]))
    chex.assert_trees_all_equal(plan.row, np.array([[3, 0], [1, 4], [5, 2]]))
    chex.assert_trees_all_equal(plan.start, np.array([0, 2, 3, 6]))
    chex.assert_trees_all_equal(plan.load, np.array([2, 1, 3, 0]))


@pytest.mark.parametrize("assignments, experts", [(1, 32), (32, 32), (8192, 32), (7, 1), (4096, 1000)])
def test_block_shape_covers_a_uniform_router(assignments, experts):
    capacity, rows = block_shape(assignments, experts)
    assert rows >= 1
    assert (capacity == 0) == (assignments < experts)
    assert capacity == 0 or assignments / experts <= capacity <= 3 * assignments / experts + 4


def test_router_hand_worked():
    # Softmax of ln(1, 2, 5) is (1, 2, 5)/8, of ln(4, 2, 2) it is (4, 2, 2)/8; logsumexp is ln 8 for both.
    logits = jnp.log(jnp.asarray([[1.0, 2.0, 5.0], [4.0, 2.0, 2.0]], jnp.float32))
    kept, normalized = (jax.jit(route, static_argnums=(1, 2))(logits, 2, flag) for flag in (False, True))
    chex.assert_trees_all_equal(kept.experts, np.array([[2, 1], [0, 1]]))
    chex.assert_trees_all_close(kept.gates, np.array([[5 / 8, 2 / 8], [4 / 8, 2 / 8]]), rtol=1e-6)
    chex.assert_trees_all_close(normalized.gates, np.array([[5 / 7, 2 / 7], [4 / 6, 2 / 6]]), rtol=1e-6)
    # f = (1, 2, 1)/4, p = (5, 4, 7)/16: 3·(5 + 8 + 7)/64 = 15/16.
    assert float(kept.load_balance) == pytest.approx(15 / 16)
    assert float(kept.router_z) == pytest.approx(np.log(8) ** 2)
    # Entropies: ln 8 - (2 ln 2 + 5 ln 5)/8 and ln 8 - (4 ln 4 + 4 ln 2)/8.
    entropy = np.log(8) - (2 * np.log(2) + 5 * np.log(5) + 12 * np.log(2)) / 16
    assert float(kept.entropy) == pytest.approx(entropy, rel=1e-5)


def test_one_expert_for_all_is_the_worst_load_balance():
    logits = jnp.zeros((5, 4), jnp.float32).at[:, 1].set(50.0)
    assert float(jax.jit(route, static_argnums=(1, 2))(logits, 1, True).load_balance) == pytest.approx(4.0)


def router64(params, k, normalize):
    """Gates and experts (T, k) of the tokens, and the logits and probabilities (T, X), in float64."""
    logits = TOKENS.astype(np.float64) @ np.asarray(params["router"], np.float64)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    experts = np.argsort(-p, axis=1)[:, :k]
    gates = np.take_along_axis(p, experts, axis=1)
    return gates / gates.sum(axis=1, keepdims=True) if normalize else gates, experts, logits, p


def layer_outputs(config, seed=0):
    layer, x = MoE(config), TOKENS.reshape(2, T // 2, D)
    params = jax.jit(lambda x: layer.init(jax.random.key(seed), x, train=False)["params"])(x)
    apply = jax.jit(lambda p: layer.apply({"params": p}, x, train=True, mutable=["losses", "metrics"]))
    return params, *apply(params)


@pytest.mark.parametrize(
    "implementation, activation, normalize, k",
    [
        ("blocks", "gelu", True, 1),
        ("blocks", "swiglu", False, 2),
        ("blocks", "gelu", True, NUM_EXPERTS),
        ("ragged", "swiglu", True, 2),
        ("ragged", "gelu", False, NUM_EXPERTS),
        ("groups", "gelu", True, 1),
        ("groups", "swiglu", False, 2),
        ("groups", "gelu", True, NUM_EXPERTS),
    ],
)
def test_layer_equals_float64(implementation, activation, normalize, k):
    config = model(implementation, activation=activation, normalize_gates=normalize, top_k=k)
    params, y, _ = layer_outputs(config)
    gates, experts, _, _ = router64(params, k, normalize)
    expected = moe64(TOKENS, gates, experts, (params["w_in"], params["w_out"], params.get("w_gate")))
    chex.assert_trees_all_close(np.asarray(y).reshape(T, D), expected, rtol=2e-5, atol=2e-6)


def test_fine_grained_layer_and_its_losses_equal_float64():
    # As in OLMoE: many narrow SwiGLU experts, gates as the softmax gave them.
    config = model(
        activation="swiglu",
        normalize_gates=False,
        num_experts=8,
        top_k=3,
        expert_dim=4,
        load_balance_weight=0.5,
        router_z_weight=0.25,
    )
    params, y, sown = layer_outputs(config)
    gates, experts, logits, p = router64(params, 3, normalize=False)
    expected = moe64(TOKENS, gates, experts, (params["w_in"], params["w_out"], params["w_gate"]))
    chex.assert_trees_all_close(np.asarray(y).reshape(T, D), expected, rtol=2e-5, atol=2e-6)
    f = np.bincount(experts.ravel(), minlength=8) / (3 * T)
    losses = {name: float(value) for name, value in sown["losses"].items()}
    assert losses == {
        "load_balance": pytest.approx(0.5 * 8 * (f @ p.mean(axis=0)), rel=1e-5),
        "router_z": pytest.approx(0.25 * np.mean(np.log(np.exp(logits).sum(axis=1)) ** 2), rel=1e-5),
    }


def test_sown_losses_carry_their_weights_and_metrics_do_not():
    config = model(top_k=2, load_balance_weight=0.5, router_z_weight=0.25)
    params, _, sown = layer_outputs(config)
    router = jax.jit(route, static_argnums=(1, 2))(TOKENS @ np.asarray(params["router"]), 2, True)
    losses = {name: float(value) for name, value in sown["losses"].items()}
    assert losses == {
        "load_balance": pytest.approx(0.5 * float(router.load_balance), rel=1e-5),
        "router_z": pytest.approx(0.25 * float(router.router_z), rel=1e-5),
    }
    loads = np.bincount(np.asarray(router.experts).ravel(), minlength=NUM_EXPERTS)
    metrics = {name: float(value) for name, value in sown["metrics"].items()}
    assert metrics == {
        "load_max_over_mean": pytest.approx(loads.max() / (2 * T / NUM_EXPERTS), rel=1e-5),
        "experts_chosen": (loads > 0).sum(),
        "router_entropy": pytest.approx(float(router.entropy), rel=1e-5),
    }


@pytest.mark.parametrize("over_layers", ["sum", "mean"])
@pytest.mark.parametrize("num_layers", [1, 2, 4])
def test_losses_of_all_layers_are_summed_or_averaged(over_layers, num_layers):
    moe = MoEConfig(num_experts=8, top_k=2, expert_dim=4, auxiliary_over_layers=over_layers)
    config = ModelConfig(
        vocab_size=5, embed_dim=8, num_layers=num_layers, num_heads=2, num_kv_heads=2, moe=moe
    )
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6) % 5
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens)["params"]
    zero_router = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    apply = jax.jit(lambda params: Transformer(config).apply(params, tokens, train=True, mutable=["losses"]))
    _, sown = apply({"params": zero_router})
    # By hand: 0.01·8·Σ f_i/8 = 0.01, and 0.001·(ln 8)² = 0.00432, as OLMoE's code has it for any depth.
    total = sum(float(loss) for loss in jax.tree.leaves(sown["losses"]))
    assert total == pytest.approx(0.014324 * (num_layers if over_layers == "sum" else 1), rel=1e-4)


def test_uniform_router():
    # Equal logits: p_i = 1/X, so X·Σ f_i·p_i = Σ f_i = 1 whatever was chosen; logsumexp = ln 4 = entropy.
    layer, x = MoE(model(load_balance_weight=0.01, router_z_weight=0.001)), TOKENS[None]
    params = jax.jit(lambda x: layer.init(jax.random.key(0), x, train=False)["params"])(x)
    params["router"] = jnp.zeros_like(params["router"])
    _, sown = jax.jit(lambda p: layer.apply({"params": p}, x, train=True, mutable=["losses", "metrics"]))(
        params
    )
    assert float(sown["losses"]["load_balance"]) == pytest.approx(0.01)
    assert float(sown["losses"]["router_z"]) == pytest.approx(0.001 * np.log(4) ** 2)
    assert float(sown["metrics"]["router_entropy"]) == pytest.approx(np.log(4))


def test_losses_and_gates_reach_the_router():
    layer, x = MoE(model(normalize_gates=True)), TOKENS[None]
    params = jax.jit(lambda x: layer.init(jax.random.key(0), x, train=False)["params"])(x)

    @jax.jit
    @jax.grad
    def slopes(params, weights):
        y, sown = layer.apply({"params": params}, x, train=True, mutable=["losses"])
        parts = jnp.stack([jnp.sum(y), sown["losses"]["load_balance"], sown["losses"]["router_z"]])
        return jnp.sum(parts * weights)

    for weights in np.eye(3, dtype=np.float32):
        assert np.abs(slopes(params, weights)["router"]).max() > 1e-6


def test_computes_in_bfloat16_on_float32_parameters():
    # The router is float32 in both, so both choose the same experts.
    for implementation in ("blocks", "ragged", "groups"):
        params, y, sown = layer_outputs(model(implementation, dtype="bfloat16"))
        chex.assert_type(y, jnp.bfloat16)
        assert {w.dtype.name for w in jax.tree.leaves((params, sown))} == {"float32"}
        chex.assert_trees_all_close(
            np.asarray(y, np.float32), layer_outputs(model(implementation))[1], rtol=1e-7, atol=0.02
        )


def _served(weights, dtype):
    return ExpertWeights(
        *(
            None if w is None else tuple(OutputMajor(jnp.asarray(e.T, jnp.dtype(dtype))) for e in w)
            for w in weights
        )
    )


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("loads", ["even", "skewed", "one"])
def test_served_experts_equal_the_definition_whatever_their_loads(activation, dtype, loads):
    weights = expert_weights(activation)
    served = _served(weights, dtype)
    # 24 tokens fill several blocks of an expert that all of them chose; 2 leave most experts out.
    for tokens, k in ((T, 2), (2, 1)):
        experts = chosen(loads, k)[:tokens]
        gates = RNG.uniform(size=(tokens, k)).astype(np.float32)
        x = TOKENS[:tokens]
        y = jax.jit(served_experts)(jnp.asarray(x, jnp.dtype(dtype)), gates, experts, served)
        chex.assert_type(y, jnp.float32)
        expected = moe64(x, gates, experts, weights)
        if dtype == "float32":
            chex.assert_trees_all_close(y, expected, rtol=2e-5, atol=2e-5)
        else:  # eight bits of x, of the weights and of what is between the two products
            assert np.abs(y - expected).max() < 0.03 * np.abs(expected).max()


def test_experts_that_nobody_chose_are_not_read():
    weights, experts = expert_weights("gelu"), chosen("one", 2)[:3]
    idle = sorted(set(range(len(weights.w_in))) - set(experts.ravel().tolist()))
    assert idle
    spoiled = weights._replace(w_in=weights.w_in.copy(), w_out=weights.w_out.copy())
    spoiled.w_in[idle], spoiled.w_out[idle] = np.nan, np.nan
    gates = np.full((3, 2), 0.5, np.float32)
    y = jax.jit(served_experts)(TOKENS[:3], gates, experts, _served(spoiled, "float32"))
    chex.assert_trees_all_close(y, moe64(TOKENS[:3], gates, experts, weights), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("assignments", "float32", "bfloat16"),
    [(1, 1, 4), (8, 1, 4), (9, 4, 4), (32, 4, 4), (128, 8, 8), (160, 16, 12), (512, 16, 24), (820, 32, 32)],
)
def test_a_block_of_served_experts_is_a_bit_longer_than_their_mean_load(assignments, float32, bfloat16):
    assert block_rows(assignments, 32, jnp.dtype("float32")) == float32
    assert block_rows(assignments, 32, jnp.dtype("bfloat16")) == bfloat16
