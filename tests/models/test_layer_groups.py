"""Scans over equal layers and remat: the same numbers and parameters, one layer to compile."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import pytest

from ultramem_jax.config import ModelConfig, MoEConfig, RunConfig, TrainConfig
from ultramem_jax.models import Transformer
from ultramem_jax.presets import families
from ultramem_jax.training.step import language_model_objective

LAYERS = ModelConfig(vocab_size=31, embed_dim=16, num_layers=3, num_heads=2, num_kv_heads=1, mlp_dim=24)
SIX = dataclasses.replace(LAYERS, num_layers=6)
MEMORY = families.ultramem(placement="2:4/5:6", num_keys=8, top_m=3, num_heads=1, key_dim=8, value_dim=8)
MODELS = {
    "dense": LAYERS,
    "swiglu": dataclasses.replace(LAYERS, mlp="swiglu", attention_qk_norm="all_heads", tie_embeddings=False),
    "moe": dataclasses.replace(LAYERS, moe=MoEConfig(num_experts=4, top_k=2, expert_dim=8)),
    "ultramem": dataclasses.replace(SIX, memories={"memory": MEMORY}),
    "engram": dataclasses.replace(
        SIX,
        memories={
            "engram": families.engram(
                placement="before@2/before@4", heads_per_order=2, rows_per_head=(50,), value_dim=4
            )
        },
    ),
    "instead": dataclasses.replace(
        SIX,
        memories={
            "plus": families.memory_plus(
                placement="instead@3", num_keys=8, top_m=3, num_heads=1, key_dim=8, value_dim=16
            )
        },
    ),
}
TOKENS = jax.random.randint(jax.random.key(1), (2, 9), 0, 31)


def _gradients(model, variables, remat, tokens=TOKENS):
    """The loss of a batch, its gradient, and the metrics that layers sow."""
    objective = language_model_objective(RunConfig(model=model, train=TrainConfig(remat=remat)))

    def loss(params):
        value, (_, metrics) = objective.loss({**variables, "params": params}, {}, tokens, jax.random.key(0))
        return value, metrics

    (value, metrics), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    return value, metrics, gradients


@pytest.mark.parametrize(
    "name, groups",
    [
        ("dense", [(1, 3)]),
        ("moe", [(1, 3)]),
        ("ultramem", [(1, 2), (3, 4), (5, 5), (6, 6)]),
        ("engram", [(1, 1), (2, 3), (4, 6)]),
        ("instead", [(1, 2), (3, 3), (4, 6)]),
    ],
)
def test_memories_stand_between_groups(name, groups):
    found = MODELS[name].layer_groups
    assert [(group[0], group[-1]) for group in found] == groups
    assert [layer for group in found for layer in group] == list(range(1, groups[-1][-1] + 1))


@functools.cache
def _unscanned(name):
    """The variables of a model without scan and remat, and what `_gradients` finds there."""
    variables = Transformer(MODELS[name]).init(jax.random.key(0), TOKENS[:, :-1])
    variables = {part: variables[part] for part in ("params", "memory", "buffers") if part in variables}
    return variables, _gradients(MODELS[name], variables, "none")


# Without a scan and remat the model would be compared with itself.
@pytest.mark.parametrize(
    "scans, remat",
    [(True, "none"), (True, "products"), (True, "layers"), (False, "products"), (False, "layers")],
)
@pytest.mark.parametrize("name", MODELS)
def test_a_scan_and_remat_compute_the_same(name, scans, remat):
    variables, (value, metrics, gradients) = _unscanned(name)
    other = dataclasses.replace(MODELS[name], scan_layers=scans)
    chex.assert_trees_all_equal_shapes(
        variables["params"], jax.eval_shape(Transformer(other).init, jax.random.key(0), TOKENS)["params"]
    )
    found = _gradients(other, variables, remat)
    assert found[0] == pytest.approx(float(value), rel=2e-6)
    assert found[1].keys() == metrics.keys()
    chex.assert_trees_all_close(found[1], metrics, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(found[2], gradients, rtol=2e-4, atol=2e-6)


def test_gradients_of_experts_are_summed_in_float32_in_a_scan():
    model = dataclasses.replace(MODELS["moe"], num_layers=2, dtype="bfloat16")
    variables = {"params": Transformer(model).init(jax.random.key(0), TOKENS)["params"]}
    # Equal tokens go to the same experts, whose gradients are then sums over several groups of rows.
    tokens = jnp.ones((2, 129), jnp.int32)

    def rounded(scans):
        """The share of the gradients of experts' weights that bfloat16 can represent."""
        other = dataclasses.replace(model, scan_layers=scans)
        _, _, gradients = _gradients(other, variables, "none", tokens)
        experts = [a for a in jax.tree.leaves(gradients) if a.ndim == 3]
        same = [(a.astype(jnp.bfloat16).astype(jnp.float32) == a) & (a != 0) for a in experts]
        return sum(a.sum() for a in same) / sum((a != 0).sum() for a in experts)

    assert rounded(True) < 0.8 and rounded(False) < 0.8


def test_a_scanned_layer_is_traced_once():
    def lines(layers, scans):
        model = dataclasses.replace(LAYERS, num_layers=layers, scan_layers=scans)
        variables = jax.eval_shape(Transformer(model).init, jax.random.key(0), TOKENS)
        lowered = jax.jit(Transformer(model).apply).lower(variables, TOKENS)
        return lowered.as_text().count("dot_general")

    assert lines(12, True) == lines(3, True) < lines(3, False) < lines(12, False)


def test_dropout_in_a_scan_differs_from_layer_to_layer():
    model = dataclasses.replace(LAYERS, dropout=0.5, scan_layers=True)
    variables = Transformer(model).init(jax.random.key(0), TOKENS)

    def logits(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return Transformer(model).apply(variables, TOKENS, train=True, rngs=rngs)

    assert jnp.array_equal(logits(0), logits(0)) and not jnp.allclose(logits(0), logits(1))


def test_remat_keeps_less_for_the_backward_pass():
    model = dataclasses.replace(LAYERS, embed_dim=64, mlp_dim=256, scan_layers=True)
    variables = Transformer(model).init(jax.random.key(0), TOKENS)
    tokens = jnp.zeros((8, 65), jnp.int32)
    held = {}
    for remat in ("none", "products", "layers"):
        objective = language_model_objective(RunConfig(model=model, train=TrainConfig(remat=remat)))

        def loss(params, objective=objective):
            return objective.loss({**variables, "params": params}, {}, tokens, jax.random.key(0))[0]

        compiled = jax.jit(jax.grad(loss)).lower(variables["params"]).compile()
        held[remat] = compiled.memory_analysis().temp_size_in_bytes
    assert held["layers"] < held["products"] < held["none"]
