"""Engram's released layer: against reference vectors where they are there, and against an oracle."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.interop.test_reference_torch import FIXTURES, close
from tests.support import engram_oracle as oracle
from ultramem_jax.errors import UserError
from ultramem_jax.interop.reference_torch import dump, load

HYPER = {
    "layer": "engram",
    "hidden_size": 12,
    "n_embed_per_ngram": 6,
    "n_head_per_ngram": 3,
    "max_ngram_size": 3,
    "kernel_size": 4,
    "engram_vocab_size": [61, 97],
    "layer_ids": [1, 4],
    "layer_id": 4,
    "pad_id": 5,
    "seed": 3,
    "vocab_size": 50,
    "canonical_vocab_size": 31,
    "norm_eps": {"gate": None, "conv": 1e-5},
}
CASES = {
    "two layers": {},
    "the first layer": {"layer_id": 1},
    "from layer zero": {"layer_ids": [0, 7, 15], "layer_id": 7},
    "bigrams": {"max_ngram_size": 2, "engram_vocab_size": [11], "kernel_size": 3},
    "orders to five": {"max_ngram_size": 5, "engram_vocab_size": [7, 31, 31, 100], "n_head_per_ngram": 2},
    "a large vocabulary": {"vocab_size": 129_280, "canonical_vocab_size": 99_000, "pad_id": 2},
    "another epsilon": {"norm_eps": {"gate": 1e-3, "conv": 1e-2}},
}
EPS = float(np.finfo(np.float32).eps)


def case(name, seed=0):
    """Hyper-parameters, a random state dict, x and token ids."""
    hyper = HYPER | CASES[name]
    rng = np.random.default_rng(seed)
    d, order, heads = hyper["hidden_size"], hyper["max_ngram_size"], hyper["n_head_per_ngram"]
    width = hyper["n_embed_per_ngram"]
    sizes = oracle.table_sizes(hyper["engram_vocab_size"], heads, len(hyper["layer_ids"]))
    rows = sum(sizes[hyper["layer_ids"].index(hyper["layer_id"])])
    shapes = {
        "multi_head_embedding.embedding.weight": (rows, width // heads),
        "value_proj.weight": (d, width * (order - 1)),
        "value_proj.bias": (d,),
        "key_projs.0.weight": (d, width * (order - 1)),
        "key_projs.0.bias": (d,),
        "norm1.0.weight": (d,),
        "norm2.0.weight": (d,),
        "short_conv.conv.weight": (d, 1, hyper["kernel_size"]),
        "short_conv.norms.0.weight": (d,),
    }
    state = {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
    canonical = rng.integers(0, hyper["canonical_vocab_size"], hyper["vocab_size"])
    x = rng.normal(size=(2, 9, d)).astype(np.float32)
    return hyper, state | {"lookup_table": canonical}, x, rng.integers(0, hyper["vocab_size"], (2, 9))


def expected_slots(hyper, state, tokens):
    heads, layers = hyper["n_head_per_ngram"], hyper["layer_ids"]
    sizes = oracle.table_sizes(hyper["engram_vocab_size"], heads, len(layers))
    sizes = sizes[layers.index(hyper["layer_id"])]
    factors = oracle.multipliers(
        hyper["seed"], hyper["layer_id"], hyper["canonical_vocab_size"], hyper["max_ngram_size"]
    )
    table = state["lookup_table"]
    return oracle.slots(table[tokens], table[hyper["pad_id"]], factors, sizes, heads)


def expected_output(hyper, state, x, slots):
    eps = hyper["norm_eps"]
    p = {
        "value_projection": state["value_proj.weight"].T,
        "value_bias": state["value_proj.bias"],
        "key_projection": state["key_projs.0.weight"].T,
        "key_bias": state["key_projs.0.bias"],
        "gate_key_scale": state["norm1.0.weight"],
        "gate_hidden_scale": state["norm2.0.weight"],
        "conv_scale": state["short_conv.norms.0.weight"],
        "conv": state["short_conv.conv.weight"][:, 0].T[::-1],
    }
    table = state["multi_head_embedding.embedding.weight"]
    hidden = x.astype(np.float64)
    return oracle.layer(p, table, slots, hidden, hyper["max_ngram_size"], eps["gate"] or EPS, eps["conv"])


@pytest.mark.parametrize("name", CASES)
def test_rows_and_outputs_of_the_definition(name):
    hyper, state, x, tokens = case(name)
    module, variables = load(state, hyper)
    apply = jax.jit(lambda v, x, tokens: module.apply(v, x, tokens, mutable=["reads"]))
    y, sown = apply(variables, x, tokens)
    slots = expected_slots(hyper, state, tokens)
    found = np.asarray(sown["reads"]["memory_0"]["slots"]).reshape(slots.shape)
    chex.assert_trees_all_equal(found, slots)
    close(y, expected_output(hyper, state, x, slots), name)


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
    close(y, arrays["f64.output"], "output")
    first = np.concatenate([[0], np.cumsum(arrays["table_sizes"])[:-1]])
    slots = np.asarray(sown["reads"]["memory_0"]["slots"]).reshape(arrays["hash_ids"].shape)
    chex.assert_trees_all_equal(slots, arrays["hash_ids"] + first)

    def objective(variables, x):
        return (module.apply(variables, x, arrays["token_ids"]) * arrays["cotangent"]).sum()

    of_variables, of_x = jax.jit(jax.grad(objective, (0, 1)))(variables, jnp.asarray(arrays["x"]))
    close(of_x, arrays["f64.grad.x"], "x")
    gradients = dump(of_variables, hyper)
    for name in names:
        close(gradients[name], arrays[f"f64.grad.{name}"], name)


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
