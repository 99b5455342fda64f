"""The authors' weights: against their own numbers where the fixtures are there, and against an oracle."""

import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import authors_oracle as oracle
from tests.support import synthetic
from tests.support.assertions import assert_close_by_size
from tests.support.paths import FIXTURES
from ultramem_jax.errors import UserError
from ultramem_jax.interop.reference_torch import dump, load
from ultramem_jax.ops import product_keys

_FOUND = sorted(path for kind in ("v1_*", "v2_*", "memory_plus*") for path in FIXTURES.glob(kind + ".npz"))
fixtures = pytest.mark.parametrize(
    "path",
    _FOUND or [pytest.param(None, marks=pytest.mark.skip(reason=f"no reference vectors in {FIXTURES}"))],
    ids=lambda path: path.stem if path else "absent",
)


def read_fixture(path: pathlib.Path) -> tuple[dict, dict, dict]:
    """Hyper-parameters, state dict and all arrays."""
    hyper = json.loads(path.with_suffix(".json").read_text())
    with np.load(path) as file:
        arrays = dict(file)
    known = {*synthetic.shapes(hyper)}
    buffers = ("shuffle_index", "tucker_core_u", "tucker_core_v")
    state = {k: v for k, v in arrays.items() if k in known or (k.endswith(buffers) and "." not in k)}
    state |= {k: v for k, v in arrays.items() if k.startswith("mem_blocks.") and k.endswith(buffers)}
    return hyper, state, arrays


def gradients(module, variables, x, cotangent):
    def objective(variables, x):
        return (module.apply(variables, x) * cotangent).sum()

    return jax.jit(jax.grad(objective, argnums=(0, 1)))(variables, jnp.asarray(x))


def reads(module, variables, x):
    """Output, slots, blocks and scores, with a leading axis of layers."""
    y, sown = jax.jit(lambda v, x: module.apply(v, x, mutable=["reads"]))(variables, x)
    layers = [sown["reads"][f"memory_{i}"] for i in range(len(sown["reads"]))]
    return y, *(np.stack([layer[name] for layer in layers]) for name in ("slots", "blocks", "weights"))


def inner_values(hyper, state, x, slots):
    """(layers, T, R): act(u·p) of the slots that were read."""
    found = []
    for i, tokens in enumerate(x.reshape(len(x), -1, x.shape[-1]).astype(np.float64)):
        inputs = tokens @ state[f"mem_blocks.{i}.pre_values_proj.weight"].T
        rows = state["full_memory_layer.pre_values_for_look_up"][slots[i]]
        found.append(np.einsum("td,tjd->tj", inputs, rows))
    return np.vectorize(oracle.gelu)(found) if hyper["use_glu_act"] else np.array(found)


@fixtures
def test_outputs_and_reads_of_the_reference(path):
    hyper, state, arrays = read_fixture(path)
    module, variables = load(state, hyper)
    y, slots, blocks, scores = reads(module, variables, arrays["x"])
    assert_close_by_size(y, arrays["output"], "output")
    chex.assert_trees_all_equal(slots.reshape(arrays["physical_slots"].shape), arrays["physical_slots"])
    if not module.reference.config.readout.sum_blocks:
        chex.assert_trees_all_equal(blocks.reshape(arrays["groups"].shape), arrays["groups"])
    expected = arrays["best_scores"].reshape(scores.shape)
    if hyper["layer"] == "memory_plus":  # the layer pools by their softmax over the m reads of a head
        of_heads = np.exp(expected.reshape(-1, hyper["head"], hyper["knn"]))
        expected = (of_heads / of_heads.sum(-1, keepdims=True)).reshape(scores.shape)
    if hyper.get("pre_vdim"):  # and by their product with what the slot makes of the token as an expert
        expected = expected * inner_values(hyper, state, arrays["x"], slots)[..., None]
    assert_close_by_size(scores, expected, "best_scores")


@fixtures
def test_gradients_of_the_reference(path):
    hyper, state, arrays = read_fixture(path)
    module, variables = load(state, hyper)
    by_variables, by_x = gradients(module, variables, arrays["x"], arrays["cotangent"])
    found = dump(by_variables, hyper) | {"x": by_x}
    expected = {k.removeprefix("grad."): v for k, v in arrays.items() if k.startswith("grad.")}
    assert set(synthetic.shapes(hyper)) | {"x"} == set(expected)
    for name, gradient in expected.items():
        assert_close_by_size(found[name], gradient, name)


@fixtures
def test_core_loss_of_the_reference(path):
    hyper, state, arrays = read_fixture(path)
    names = [name for name in arrays if name.startswith("aux.") and name.endswith("tucker_svd_loss")]
    if not names:
        assert hyper["layer"] == "memory_plus"
    if hyper.get("tucker_rank") == 1:
        return  # there, the mean over r - 1 values is that of none
    for name in names:
        prefix = name.removeprefix("aux.").removesuffix("tucker_svd_loss")
        cores = [state[f"{prefix}tucker_core.{i}"] for i in range(hyper["tucker_multihead"])]
        loss, by_cores = jax.value_and_grad(product_keys.core_loss)(jnp.stack(cores, axis=1), margin=0.15)
        chex.assert_trees_all_close(loss, arrays[name], rtol=1e-5)
        for i in range(len(cores)):
            assert_close_by_size(by_cores[:, i], arrays[f"aux.grad.{prefix}tucker_core.{i}"], name)


@fixtures
def test_a_reference_state_comes_back_unchanged(path):
    hyper, state, _ = read_fixture(path)
    synthetic.equal_states(dump(load(state, hyper)[1], hyper), state)


@pytest.mark.skipif(
    not (FIXTURES / "tucker_update.npz").exists(), reason=f"no reference vectors in {FIXTURES}"
)
@pytest.mark.parametrize("rank", (2, 3))
def test_sign_rule_of_the_reference(rank):
    with np.load(FIXTURES / "tucker_update.npz") as file:
        arrays = {k.removeprefix(f"r{rank}."): v for k, v in file.items() if k.startswith(f"r{rank}.")}
    heads = arrays["step0.tucker_core.0"].shape[0]
    u = t = jnp.zeros((heads, rank))
    for step in range(6):
        cores = [v for k, v in arrays.items() if k.startswith(f"step{step}.tucker_core.")]
        u, t = product_keys.leading_singular_vectors(jnp.asarray(sum(cores)), u, t)
        if step == 0:
            # From zeros both signs are equally close, and two libraries may differ in the one they find.
            agree = np.sign((u * arrays["step0.tucker_core_u"][0, :, 0]).sum(-1, keepdims=True))
            u, t = u * agree, t * agree
        chex.assert_trees_all_close(u, arrays[f"step{step}.tucker_core_u"][0, :, 0], rtol=1e-7, atol=1e-5)
        chex.assert_trees_all_close(t, arrays[f"step{step}.tucker_core_v"][0, :, 0], rtol=1e-7, atol=1e-5)


@pytest.mark.parametrize("name", synthetic.CASES)
def test_outputs_and_reads_of_the_oracle(name):
    hyper, state, x, expected = synthetic.case(name)
    module, variables = load(state, hyper)
    y, slots, blocks, _ = reads(module, variables, x)
    assert_close_by_size(y, expected.output, name)
    chex.assert_trees_all_equal(np.sort(slots), np.sort(expected.slots))
    if not module.reference.config.readout.sum_blocks:
        chex.assert_trees_all_equal(np.sort(blocks), np.sort(expected.blocks))


@pytest.mark.parametrize("name", synthetic.CASES)
def test_round_trip(name):
    hyper = synthetic.CASES[name]
    state = synthetic.random_state(hyper, 0)
    synthetic.equal_states(dump(load(state, hyper)[1], hyper), state)


@pytest.mark.parametrize("name", ("v1_three_heads", "v2_everything", "memory_plus"))
def test_gradients_of_the_oracle(name):
    """Six derivatives of each array equal central differences; the balance loss is in both."""
    hyper, state, x, _ = synthetic.case(name, tokens=(1, 2))
    rng = np.random.default_rng(0)
    cotangent = rng.normal(size=x.shape).astype(np.float32)
    by_variables, by_x = gradients(*load(state, hyper), x, cotangent)
    found = dump(by_variables, hyper) | {"x": np.asarray(by_x)}
    point = {k: v.astype(np.float64) for k, v in {**state, "x": x}.items() if not k.endswith("shuffle_index")}
    fixed = {k: v for k, v in state.items() if k.endswith("shuffle_index")}

    def objective(point):
        return oracle.objective(point | fixed, hyper, point["x"], cotangent.astype(np.float64))

    for key in [*synthetic.shapes(hyper), "x"]:
        gradient = found[key]
        # The largest, so that some of a table's rows were read, and some at random.
        chosen = (
            np.argsort(-np.abs(gradient), axis=None)[:3].tolist()
            + rng.integers(gradient.size, size=3).tolist()
        )
        for index in (np.unravel_index(i, gradient.shape) for i in chosen):
            sides = []
            for step in (1e-5, -1e-5):
                moved = point | {key: point[key].copy()}
                moved[key][index] += step
                sides.append(objective(moved))
            difference = (sides[0] - sides[1]) / 2e-5
            assert abs(difference - gradient[index]) <= 2e-5 * max(gradient.std(), abs(difference)), (
                key,
                index,
            )
    if hyper["layer"] == "memory_plus":
        assert not found["mem_blocks.0.keys_norm.weight"].any()


def test_the_balance_loss_changes_gradients_and_not_outputs():
    hyper = synthetic.CASES["v2_no_pre_values"]
    state = synthetic.random_state(hyper, 0)
    x = np.random.default_rng(0).normal(size=(3, 1, 4, 10)).astype(np.float32)
    without = hyper | dict(key_balance_reg_coef=0.0)
    (module, variables), (plain, _) = load(state, hyper), load(state, without)
    y, sown = jax.jit(lambda v: module.apply(v, x, mutable="losses"))(variables)
    chex.assert_trees_all_close(y, jax.jit(plain.apply)(variables, x), rtol=1e-5, atol=1e-6)
    expected = oracle.run(state, hyper, x.astype(np.float64)).balance
    total = sum(layer["balance"] for layer in sown["losses"].values())
    chex.assert_trees_all_close(total, 0.3 * expected, rtol=1e-5)
    # Whatever the cotangent: also where it is zero.
    nothing = np.zeros_like(x)
    found = dump(gradients(module, variables, x, nothing)[0], hyper)
    assert np.abs(found["mem_blocks.2.keys"]).max() > 0
    assert not found["full_memory_layer.values_for_look_up"].any()
    for leaf in jax.tree.leaves(gradients(plain, variables, x, nothing)):
        assert not leaf.any()


def test_apply_returns_the_collections_that_were_asked_for():
    hyper = synthetic.CASES["v2_no_pre_values"]
    module, variables = load(synthetic.random_state(hyper, 0), hyper)
    x = np.ones((3, 1, 2, 10), np.float32)

    def sown(mutable):
        return jax.jit(lambda v: module.apply(v, x, mutable=mutable)[1])(variables)

    assert set(sown(["reads"])) == {"reads"}
    of_two = sown(["buffers", "losses"])
    assert set(of_two) == {"buffers", "losses"}
    for name in ("row_direction", "column_direction"):
        chex.assert_trees_all_close(
            of_two["buffers"]["memory_1"][name], variables["buffers"]["memory_1"][name], rtol=1e-7, atol=1e-5
        )
    assert {"reads", "metrics", "losses", "params"} <= set(sown(True))
    with pytest.raises(UserError, match=r"x.shape = .*must be \(layers, B, S, D\) with layers = 3, D = 10"):
        module.apply(variables, x[:2])
