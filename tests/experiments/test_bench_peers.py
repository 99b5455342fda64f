"""Peers in PyTorch that `bench_step` times: they compute what our operations compute."""

import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench_step import authors
from experiments.bench_step.authors import AuthorsLayer
from experiments.bench_step.fbgemm import FbgemmLookup, OwnLookup, is_installed
from experiments.bench_step.memory_step import EMBED_DIM, Way, bench_memory
from tests.support.assertions import assert_close_by_size
from ultramem_jax.errors import UserError
from ultramem_jax.interop.reference_torch import load
from ultramem_jax.ops.lookup import pooled_lookup

CHECKOUT = os.environ.get("ULTRAMEM_AUTHORS", "")
"""A checkout of the authors' repository."""


def lookup_steps(lookup, num_slots, width=128):
    """Does two steps, the second of which reads rows of the first; returns what they leave."""
    rng = np.random.default_rng(1)
    left = []
    for _ in range(2):
        slots = rng.integers(0, num_slots // 4, (16, 8), np.int32)
        weights = rng.standard_normal((16, 8), np.float32)
        seconds = lookup.step(slots, weights, rng.standard_normal((16, width), np.float32))
        assert min(seconds) > 0
        left.append((lookup.pooled, lookup.score_gradient))
    return {"pooled, gradients of scores": left, "table": lookup.table}


def assert_agree(first, second):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), first, second)


def test_fbgemm_and_our_operations_agree():
    pytest.importorskip("torch")
    pytest.importorskip("fbgemm_gpu")
    assert is_installed()
    before = OwnLookup(256, 128).table
    ours, theirs = (lookup_steps(lookup(256, 128), 256) for lookup in (OwnLookup, FbgemmLookup))
    assert_agree(ours, theirs)
    changed = np.abs(ours["table"] - before).max(1) > 1e-5
    assert 0 < changed.sum() <= 64 and not changed[64:].any()


def test_kernels_and_xla_agree():
    assert_agree(*(lookup_steps(OwnLookup(256, 128, kernels=kernels), 256) for kernels in (True, False)))


def test_the_lookup_of_the_authors_layer_is_ours():
    torch = pytest.importorskip("torch")
    tokens, reads, num_slots, blocks, width, cores = 8, 16, 32, 4, 12, 2
    rng = np.random.default_rng(0)
    virtual = rng.integers(0, blocks * num_slots, (tokens, reads), np.int32)
    table, scores, cotangent = (
        rng.standard_normal(shape, np.float32)
        for shape in ((num_slots, width), (tokens, reads, cores), (tokens, blocks, width))
    )

    def pool(table, scores):
        return pooled_lookup(table, virtual % num_slots, virtual // num_slots, scores, blocks)

    pooled, derivatives = jax.vjp(pool, jnp.asarray(table), jnp.asarray(scores))
    of_table, of_scores = derivatives(jnp.asarray(cotangent))

    weight = torch.nn.Parameter(torch.tensor(table))
    weight.main_grad = torch.zeros_like(weight)
    given = torch.tensor(scores).permute(2, 0, 1).contiguous().requires_grad_()
    arguments = (0, num_slots, num_slots, 0, blocks, False)
    found = authors.lookup_on_cpu().apply(torch.tensor(virtual), weight, given, *arguments)
    found.backward(torch.tensor(cotangent).view(tokens, -1))
    assert_close_by_size(found.detach().numpy().reshape(pooled.shape), pooled, "pooled")
    assert_close_by_size(given.grad.permute(1, 2, 0).numpy(), of_scores, "gradient by scores")
    assert_close_by_size(weight.main_grad.numpy(), of_table, "gradient by table")


@pytest.mark.skipif(not CHECKOUT, reason="ULTRAMEM_AUTHORS is not set")
def test_the_authors_layer_finds_the_gradient_that_ours_finds():
    pytest.importorskip("torch")
    num_keys, tokens = 32, 16
    authors_layer = AuthorsLayer(CHECKOUT, num_keys, tokens)
    state = {name: array.numpy().copy() for name, array in authors_layer.layer.state_dict().items()}
    memory = bench_memory(num_keys, Way())
    assert state["values_for_look_up"].shape == (num_keys**2, memory.table.value_dim)
    hyper = dict(layer="v1", hidden_size=EMBED_DIM, knum=num_keys, kdim=32, vdim=128, knn=32, head=2)
    hyper |= dict(tucker_rank=2, tucker_multihead=2, value_expand_time=4)
    module, variables = load(state, hyper)
    x, target = np.random.default_rng(0).standard_normal((2, 2, tokens // 2, EMBED_DIM), np.float32)

    def error(x):
        return jnp.mean((module.apply(variables, x) - target) ** 2)

    assert_close_by_size(authors_layer.step(x, target), jax.jit(jax.grad(error))(x), "gradient by x")
    after = authors_layer.layer.state_dict()
    assert all(np.abs(after[name].numpy() - state[name]).max() > 0 for name in ("keys", "values_for_look_up"))
    assert not authors_layer.layer.values_for_look_up.grad.any()


def test_bad_checkouts_get_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"authors = .*: must be a checkout of https://") as raised:
        AuthorsLayer(str(tmp_path), 32, 16)
    assert str(tmp_path) in str(raised.value)
    (tmp_path / "olmo").mkdir()
    (tmp_path / "olmo" / "ultramem_layer.py").write_text("import torch\n")
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"authors = .*: must not be given without PyTorch"):
            AuthorsLayer(str(tmp_path), 32, 16)
        assert not is_installed()
    pytest.importorskip("torch")
    with pytest.raises(UserError, match=r"authors = .*UltraMemLayerV1") as raised:
        AuthorsLayer(str(tmp_path), 32, 16)
    assert len(str(raised.value).splitlines()) == 1


def test_bytes_of_the_authors_state():
    # Row, gradient and two moments in float32, and four entries of the permutation.
    assert authors.state_bytes(32) == 1024 * (4 * 128 * 4 + 4 * 8)
