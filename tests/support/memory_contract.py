"""Checks what every kind of addresser promises, whoever defines it: one function for each promise.

They take a `ModelConfig` with memories of that kind. A vocabulary of 31, rows that a mesh of four owners
divides, and two layers keep them fast; `CHECKS` lists them all.
"""

import functools
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np

from tests.support.decoding import assert_decodes
from tests.support.drawn import variables_of
from ultramem_jax.accounting import count_parameters
from ultramem_jax.config import DataConfig, MeshConfig, ModelConfig, RunConfig, TrainConfig
from ultramem_jax.kernels import native
from ultramem_jax.layers import Memory
from ultramem_jax.models import Transformer
from ultramem_jax.models.serving import prepare_for_decoding
from ultramem_jax.parallel.mesh import make_mesh, mesh_axes, one_device, shard_batch
from ultramem_jax.training.dense_optimizer import make_optimizers
from ultramem_jax.training.loop import train
from ultramem_jax.training.restore import load_model
from ultramem_jax.training.state import abstract_state, fresh_state, model_variables, state_of
from ultramem_jax.training.step import make_train_step

BASE = ModelConfig(vocab_size=31, embed_dim=16, num_layers=2, num_heads=2, num_kv_heads=1, mlp_dim=24)
"""A model to put a memory into."""


@functools.cache
def _variables(model):
    """Returns variables without special values: what starts at zero would hide a mistake."""
    rng = np.random.default_rng(0)
    held = variables_of(model)

    def stirred(a):
        return a + 0.1 * jnp.asarray(rng.normal(size=a.shape), a.dtype)

    return held | {"params": jax.tree.map(stirred, held["params"])}


def _tokens(model, sequences=2, length=9, seed=1):
    return np.random.default_rng(seed).integers(0, model.vocab_size, (sequences, length)).astype(np.int32)


@functools.cache
def _full(model):
    return np.asarray(jax.jit(Transformer(model).apply)(_variables(model), _tokens(model)))


def forget():
    """Forgets what was compiled and computed, for the same checks in another way."""
    for cached in (_full, _initialised, _trained):
        cached.cache_clear()


def jit_equals_eager(model):
    """A memory gives the same with and without jit, and is traced once."""
    site, variables = model.sites[0], _variables(model)
    own = {part: tree[site.name] for part, tree in variables.items() if site.name in tree}
    x, tokens = jax.random.normal(jax.random.key(1), (2, 9, 16)), jnp.asarray(_tokens(model))

    def apply(x):
        return Memory(site).apply(own, x, train=False, token_ids=tokens)

    chex.clear_trace_counter()
    compiled = jax.jit(chex.assert_max_traces(apply, n=1))
    y = compiled(x)
    chex.assert_equal_shape([y, x])
    chex.assert_tree_all_finite(y)
    chex.assert_trees_all_close(y, apply(x), rtol=1e-4, atol=1e-5)
    compiled(x + 1)


def gradients_reach_every_parameter(model):
    """Every parameter of the memories, and every table, has a finite gradient that is not zero."""
    variables, tokens = _variables(model), _tokens(model)

    def loss(differentiated):
        logits, sown = Transformer(model).apply(variables | differentiated, tokens, mutable=["losses"])
        return (logits**2).sum() + sum(jax.tree.leaves(sown), jnp.zeros(()))

    trained = {"params": variables["params"], "memory": variables["memory"]}
    gradients = jax.jit(jax.grad(loss))(trained)
    for site in model.sites:
        own = {"params": gradients["params"][site.name], "memory": gradients["memory"][site.table]}
        chex.assert_tree_all_finite(own)
        for path, gradient in jax.tree_util.tree_leaves_with_path(own):
            assert gradient.any(), path


def no_token_sees_what_comes_after_it(model):
    """Logits stay as they are where only later tokens change."""
    tokens = _tokens(model)
    later = tokens.copy()
    later[:, 5:] = (later[:, 5:] + 7) % model.vocab_size
    after = jax.jit(Transformer(model).apply)(_variables(model), later)
    chex.assert_trees_all_close(_full(model)[:, :5], after[:, :5], rtol=1e-4, atol=1e-5)


def _run_config(model, mesh=None, **fields):
    # Rows by SGD, and an ε far above the rounding of a gradient: else Adam makes whole steps of what should
    # be zero.
    plain = dict(batch_size=8, steps=6, learning_rate=1e-2, warmup_fraction=0.0, eps=1e-4)
    plain |= dict(row_optimizer="sgd", weight_decay=0.0)
    return RunConfig(model, DataConfig(seq_len=8), TrainConfig(**plain | fields), mesh or MeshConfig())


@functools.cache
def _initialised(model):
    """Returns the variables that a run begins with on one device."""
    config = _run_config(model)
    return model_variables(fresh_state(config, make_optimizers(config), one_device(), np.uint32(0)))


def _start(config, optimizers, axes):
    """Returns the state at step 0; a mesh initialises its own."""
    if config.mesh != MeshConfig():
        return fresh_state(config, optimizers, axes, np.uint32(0))
    return state_of(config, optimizers, _initialised(config.model), jnp.uint32(0))


@functools.cache
def _trained(config, steps=2):
    """Returns the state after some steps, and the losses."""
    optimizers = make_optimizers(config)
    axes = one_device() if config.mesh == MeshConfig() else mesh_axes(config, make_mesh(config.mesh))
    with jax.numpy_dtype_promotion("standard"):
        abstract = abstract_state(config, optimizers, axes)
    shardings = jax.tree.map(lambda a: a.sharding, abstract)
    step = jax.jit(make_train_step(config, optimizers, axes=axes), out_shardings=(shardings, axes.sharding()))
    with jax.numpy_dtype_promotion("standard"):  # as optax needs it
        state, losses = jax.device_put(_start(config, optimizers, axes), shardings), []
        for number in range(steps):
            state, metrics = step(state, shard_batch(_tokens(config.model, 8, 9, number), axes))
            losses.append(float(metrics["loss"]))
    return jax.tree.map(np.asarray, state), losses


def _assert_same_training(one, other):
    (state, losses), (expected, expected_losses) = one, other
    chex.assert_trees_all_close(losses, expected_losses, rtol=1e-5)
    chex.assert_trees_all_close(state.tables, expected.tables, rtol=1e-4, atol=2e-5)
    chex.assert_trees_all_close(state.params, expected.params, rtol=1e-4, atol=2e-5)


def row_sparse_equals_dense(model):
    """Training by rows equals training whole tables with plain SGD: it changes only what has a gradient."""
    _assert_same_training(_trained(_run_config(model)), _trained(_run_config(model, table_gradient="dense")))


def kernels_equal_jax(model):
    """Training with native kernels equals training without them."""
    with native.turned_off():
        without = _trained.__wrapped__(_run_config(model))
    _assert_same_training(_trained(_run_config(model)), without)


def eight_devices_equal_one(model):
    """Tables by slots over two owners and by width over two train as on one device."""
    memories = {name: memory.changed(partition="both") for name, memory in model.memories.items()}
    both = replace(model, memories=memories)
    mesh = MeshConfig(data=2, memory=2, width=2)
    _assert_same_training(_trained(_run_config(both, mesh)), _trained(_run_config(model)))


def cached_decoding_equals_the_full_pass(model):
    """Decoding with the variables of training gives the logits of the whole sequence."""
    assert_decodes(model, _variables(model), _tokens(model), _full(model), atol=3e-5)


def served_equals_trained(model):
    """Decoding with prepared variables gives the logits of the whole sequence."""
    served = prepare_for_decoding(model, _variables(model))
    assert_decodes(model, served, _tokens(model), _full(model), atol=3e-5)


def counted_equals_real_shapes(model):
    """Every parameter is counted, and is declared with its shape."""
    shapes = jax.tree.map(lambda a: a.shape, _variables(model))
    size = {part: sum(map(np.prod, jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, tuple))))
            for part, tree in shapes.items()}  # fmt: skip
    counted = count_parameters(model)
    assert size["params"] == counted.dense + counted.experts
    assert size["memory"] == counted.memory_tables
    for site in model.sites:
        declared = {name: parameter.shape for name, parameter in site.parameters.items()}
        assert declared == shapes["params"][site.name]
        assert all(len(p.axes) == len(p.shape) for p in site.parameters.values())
        assert shapes["memory"][site.table]["values"][0] == site.num_slots
        assert site.config.reads_per_token % len(site.config.address.heads) == 0


def restored_equals_saved(model, folder):
    """A run that was cut off goes on to the same numbers, and what is loaded is what was trained."""
    text = folder / "text.txt"
    text.write_text("a memory reads a few of its slots for every token. " * 120)
    data = DataConfig("text", str(text), seq_len=8, cache_dir=str(folder / "cache"))
    model = replace(model, vocab_size=257)
    config = replace(_run_config(model, steps=4, checkpoint_every=2, eval_batches=1), data=data)
    with jax.numpy_dtype_promotion("standard"):
        whole = train(config, folder / "whole", progress=False)
        loaded = load_model(folder / "whole")
    chex.assert_trees_all_equal(loaded.variables, model_variables(whole.state))
    assert loaded.config.model.memories.keys() == model.memories.keys()
    half = folder / "half"
    (half / "checkpoints").mkdir(parents=True)
    (folder / "whole" / "checkpoints" / "2").rename(half / "checkpoints" / "2")
    with jax.numpy_dtype_promotion("standard"):
        again = train(config, half, progress=False)
    chex.assert_trees_all_equal(again.state, whole.state)


CHECKS = (
    jit_equals_eager,
    gradients_reach_every_parameter,
    no_token_sees_what_comes_after_it,
    row_sparse_equals_dense,
    eight_devices_equal_one,
    cached_decoding_equals_the_full_pass,
    served_equals_trained,
    counted_equals_real_shapes,
)
"""The checks that take only a model; `restored_equals_saved` needs a folder, too."""


def check_contract(model, folder):
    """Holds a model's memories to every promise."""
    for check in CHECKS:
        check(model)
    restored_equals_saved(model, folder)
