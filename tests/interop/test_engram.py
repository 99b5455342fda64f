"""Engram's released layer: against reference vectors where they are there, and against an oracle."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.assertions import assert_close_by_size
from tests.support.engram_states import CASES, HYPER, case, expected_output, expected_slots
from tests.support.paths import FIXTURES
from ultramem_jax.errors import UserError
from ultramem_jax.interop.reference_torch import dump, load


@pytest.mark.parametrize("name", CASES)
def test_rows_and_outputs_of_the_definition(name):
    hyper, state, x, tokens = case(name)
    module, variables = load(state, hyper)
    apply = jax.jit(lambda v, x, tokens: module.apply(v, x, tokens, mutable=["reads"]))
    y, sown = apply(variables, x, tokens)
    slots = expected_slots(hyper, state, tokens)
    found = np.asarray(sown["reads"]["memory_0"]["slots"]).reshape(slots.shape)
    chex.assert_trees_all_equal(found, slots)
    assert_close_by_size(y, expected_output(hyper, state, x, slots), name)


@pytest.mark.parametrize("name", CASES)
def test_round_trip(name):
    hyper, state, _, _ = case(name)
    again = dump(load(state, hyper)[1], hyper)
    assert set(again) == set(state)
    for key, value in state.items():
        chex.assert_trees_all_equal(again[key], value)
        chex.assert_type(again[key], value.dtype)


@pytest.mark.skipif(not (FIXTURES / "engram_a.npz").exists(), reason=f"no reference vectors in {FIXTURES}")
def test_the_reference_vectors():
    hyper = json.loads((FIXTURES / "engram_a.json").read_text())
    with np.load(FIXTURES / "engram_a.npz") as file:
        arrays = dict(file)
    names = [name[len("grad.") :] for name in arrays if name.startswith("grad.") and name != "grad.x"]
    state = {name: arrays[name] for name in [*names, "lookup_table"]}
    module, variables = load(state, hyper)
    y, sown = module.apply(variables, arrays["x"], arrays["token_ids"], mutable=["reads"])
    assert_close_by_size(y, arrays["f64.output"], "output")
    first = np.concatenate([[0], np.cumsum(arrays["table_sizes"])[:-1]])
    slots = np.asarray(sown["reads"]["memory_0"]["slots"]).reshape(arrays["hash_ids"].shape)
    chex.assert_trees_all_equal(slots, arrays["hash_ids"] + first)

    def objective(variables, x):
        return (module.apply(variables, x, arrays["token_ids"]) * arrays["cotangent"]).sum()

    of_variables, of_x = jax.jit(jax.grad(objective, (0, 1)))(variables, jnp.asarray(arrays["x"]))
    assert_close_by_size(of_x, arrays["f64.grad.x"], "x")
    gradients = dump(of_variables, hyper)
    for name in names:
        assert_close_by_size(gradients[name], arrays[f"f64.grad.{name}"], name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": "engrams"}, r"hyper\.layer.*did you mean 'engram'"),
        ({"layer_id": 2}, r"hyper\.layer_id = 2: must be one of layer_ids = \[1, 4\]"),
        ({"layer_ids": [4, 4]}, r"hyper\.layer_ids = \[4, 4\]: must be at most .* different layers"),
        ({"layer_ids": 4}, r"hyper\.layer_ids = 4: must be a list of integers"),
        ({"engram_vocab_size": [61]}, r"hyper\.engram_vocab_size = \[61\]: must have one number for each"),
        ({"engram_vocab_size": [61, 0]}, r"hyper\.engram_vocab_size = 0: must be an integer"),
        ({"n_embed_per_ngram": 7}, r"hyper\.n_embed_per_ngram = 7: must be a multiple of the 3 heads"),
        ({"max_ngram_size": 1}, r"hyper\.max_ngram_size = 1: must be an integer of at least 2"),
        ({"hc_mult": 4}, r"hyper\.hc_mult = 4: must be 1"),
        ({"canonical_vocab_size": 51}, r"hyper\.canonical_vocab_size = 51: must be at most vocab_size = 50"),
        ({"pad_id": 50}, r"hyper amounts to .*pad_id = 50: must be a token"),
        ({"norm_eps": 1e-5}, r"hyper\.norm_eps = 1e-05: must be a dict"),
        ({"norm_eps": {"gate": -1}}, r"hyper\.norm_eps\.gate = -1: must be a number of at least 0"),
        ({"seed": None}, r"hyper\.seed = None: must be an integer"),
    ],
)
def test_hyper_parameters_that_are_refused(change, message):
    _, state, _, _ = case("two layers")
    with pytest.raises(UserError, match=message) as caught:
        load(state, HYPER | change)
    assert "\n" not in str(caught.value)


def test_states_and_inputs_that_are_refused():
    hyper, state, x, tokens = case("two layers")
    far = state["lookup_table"].copy()
    far[3] = 31
    with pytest.raises(UserError, match=r"lookup_table = .*: its range must be within \[0, 31\)"):
        load(state | {"lookup_table": far}, hyper)
    with pytest.raises(UserError, match=r"has no 'value_proj\.bias'"):
        load({key: value for key, value in state.items() if key != "value_proj.bias"}, hyper)
    module, variables = load(state, hyper)
    with pytest.raises(UserError, match=r"x\.shape = \(2, 9\): must be \(B, S, D\) with D = 12"):
        module.apply(variables, x[..., 0], tokens)
    with pytest.raises(UserError, match=r"token_ids\.shape = \(2, 8\): must be that of x's tokens"):
        module.apply(variables, x, tokens[:, 1:])
    with pytest.raises(UserError, match=r"token_ids = .*: its range must be within \[0, 50\)"):
        module.apply(variables, x, tokens + 50)
