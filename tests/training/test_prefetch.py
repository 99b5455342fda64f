"""Rows gathered one step ahead: the numbers of the plain way, bit for bit, through saves and restarts."""

import functools
import signal
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.mesh_step import TRAIN, run_config
from tests.support.step_models import token_batches
from ultramem_jax.config import MeshConfig, RunConfig
from ultramem_jax.errors import UserError
from ultramem_jax.parallel.mesh import make_mesh
from ultramem_jax.platforms import targeting
from ultramem_jax.presets import families
from ultramem_jax.training import loop
from ultramem_jax.training.dense_optimizer import make_optimizers
from ultramem_jax.training.loop import train
from ultramem_jax.training.metrics import MetricWriter
from ultramem_jax.training.prefetch import gather_ahead, slots_of_tokens, with_rows_written
from ultramem_jax.training.state import init_state
from ultramem_jax.training.step import make_train_step

# Few rows: most rows of a batch were also written by the step before.
ENGRAM = families.engram(
    placement="before@1", heads_per_order=2, rows_per_head=(40,), value_dim=8, prefetch=True
)


@functools.cache
def _start(config):
    return jax.tree.map(np.asarray, jax.jit(lambda: init_state(config, make_optimizers(config)))())


def _run(prefetch, steps=5, target="cpu", train=TRAIN, **table):
    config = run_config(ENGRAM.changed(prefetch=prefetch, **table), MeshConfig(), train)
    optimizers = make_optimizers(config)
    with targeting(target):
        step = jax.jit(make_train_step(config, optimizers), donate_argnums=0)
        state = jax.device_put(_start(run_config(ENGRAM.changed(**table), MeshConfig(), train)))
        batches = token_batches(steps)
        if not prefetch:
            for tokens in batches:
                state, _ = step(state, tokens, False)
            return state
        slots = slots_of_tokens(config.model, state.buffers, batches[0])
        rows = gather_ahead(config.model, state.tables, slots)
        for tokens, following in zip(batches, [*batches[1:], batches[0]], strict=True):
            state, _, rows = step(state, tokens, False, (rows, following))
    return state


def _same_bits(one, other):
    same = jax.tree.map(lambda a, b: np.array_equal(a, b, equal_nan=True), one, other)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("target", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_are_those_of_the_plain_way(dtype, target):
    _same_bits(_run(True, dtype=dtype, target=target), _run(False, dtype=dtype, target=target))


def test_steps_that_change_selected_rows_are_those_of_the_plain_way():
    selecting = replace(TRAIN, slots_per_step=7, slot_score="reads")
    _same_bits(_run(True, train=selecting), _run(False, train=selecting))


def test_without_kernels(without_kernels):
    _same_bits(_run(True), _run(False))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_table_is_copied(dtype):
    config = run_config(ENGRAM.changed(rows_per_head=(20_011,), dtype=dtype), MeshConfig(), TRAIN)
    optimizers = make_optimizers(config)
    state = jax.eval_shape(lambda: init_state(config, optimizers))
    (site,), tokens = config.model.sites, jax.eval_shape(lambda: token_batches(1)[0])
    values = state.tables[site.table]["values"]
    reads = (tokens.shape[1] - 1) * tokens.shape[0] * site.config.reads_per_token
    rows = {site.name: {"values": jax.ShapeDtypeStruct((reads, values.shape[1]), values.dtype)}}
    step = jax.jit(make_train_step(config, optimizers), donate_argnums=0)
    compiled = step.lower(state, tokens, False, (rows, tokens)).compile()
    shape = f"[{','.join(map(str, values.shape))}]"
    copies = [line for line in compiled.as_text().splitlines() if " copy(" in line and shape in line]
    assert not copies


def test_rows_that_the_step_in_between_wrote_are_taken_from_it():
    config = run_config(ENGRAM, MeshConfig(), TRAIN).model
    (site,) = config.sites
    tables = {site.table: {"values": jnp.arange(site.num_slots * 8, dtype=jnp.float32).reshape(-1, 8)}}
    slots = {site.name: jnp.asarray([3, 7, 3, 9, 0], jnp.int32)}
    ahead = gather_ahead(config, tables, slots)
    np.testing.assert_array_equal(ahead[site.name]["values"], tables[site.table]["values"][slots[site.name]])
    last = jnp.iinfo(jnp.int32).max
    written = {site.table: (jnp.asarray([3, 8, 9, last], jnp.int32), -jnp.ones((4, 8)))}
    fresh = with_rows_written(config, ahead, slots, written)[site.name]["values"]
    assert (np.asarray(fresh)[[0, 2, 3]] == -1).all()
    np.testing.assert_array_equal(fresh[jnp.asarray([1, 4])], ahead[site.name]["values"][jnp.asarray([1, 4])])


def test_a_halted_step_prefetches_what_is_in_the_table():
    config = run_config(ENGRAM, MeshConfig(), TRAIN)
    optimizers = make_optimizers(config)
    state = init_state(config, optimizers)
    tokens, following = token_batches(2)
    slots = [slots_of_tokens(config.model, state.buffers, batch) for batch in (tokens, following)]
    rows, expected = (gather_ahead(config.model, state.tables, of_batch) for of_batch in slots)
    step = jax.jit(make_train_step(config, optimizers))
    after, _, found = step(state, tokens, jnp.asarray(True), (rows, following))
    _same_bits(found, expected)
    _same_bits(after.tables, state.tables)


@pytest.mark.parametrize("memory_kind", ["device", "pinned_host"])
def test_runs_end_on_the_same_numbers_through_a_restart(config, tmp_path, memory_kind, monkeypatch):
    monkeypatch.setattr(loop, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:1]))

    def of(prefetch):
        memory = ENGRAM.changed(prefetch=prefetch, memory_kind=memory_kind)
        model = replace(config.model, memories={"engram": memory})
        settings = replace(config.train, log_every=2, checkpoint_every=3, grad_accumulation=1)
        return replace(config, model=model, train=settings)

    plain = train(of(False), tmp_path / "plain", progress=False)
    whole = train(of(True), tmp_path / "whole", progress=False)
    monkeypatch.setattr(MetricWriter, "write", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert not train(of(True), tmp_path / "ahead", progress=False).finished
    monkeypatch.undo()
    monkeypatch.setattr(loop, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:1]))
    # A run may also go on without it.
    ahead = train(of(memory_kind == "device"), tmp_path / "ahead", progress=False)
    assert ahead.finished
    _same_bits(whole.state, plain.state)
    _same_bits(ahead.state, plain.state)


@pytest.mark.parametrize(
    "memory, changes",
    [
        (families.ultramem(placement="1:1", num_keys=4, top_m=2, key_dim=8, value_dim=8, prefetch=True), {}),
        (ENGRAM.changed(pre_value_dim=16), {}),
        (ENGRAM, {"mesh": MeshConfig(data=2)}),
        (ENGRAM, {"train": replace(TRAIN, grad_accumulation=2)}),
        (ENGRAM, {"train": replace(TRAIN, table_gradient="dense")}),
    ],
)
def test_where_it_is_refused(memory, changes):
    config = run_config(memory.changed(prefetch=False), MeshConfig(), TRAIN)
    model = replace(config.model, memories={"memory": memory})
    with pytest.raises(UserError, match=r"model\.memories\.memory\.table\.prefetch = True: must be False"):
        RunConfig(
            **{"model": model, "data": config.data, "train": config.train, "mesh": config.mesh} | changes
        )
