"""Makes state dicts of Engram's released layer at random, and what the definition computes from them."""

import numpy as np

from tests.support import engram_oracle as oracle

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
    """Returns hyper-parameters, a random state dict, x and token ids."""
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
    """Returns the rows that the definition reads for token ids."""
    heads, layers = hyper["n_head_per_ngram"], hyper["layer_ids"]
    sizes = oracle.table_sizes(hyper["engram_vocab_size"], heads, len(layers))
    sizes = sizes[layers.index(hyper["layer_id"])]
    factors = oracle.multipliers(
        hyper["seed"], hyper["layer_id"], hyper["canonical_vocab_size"], hyper["max_ngram_size"]
    )
    table = state["lookup_table"]
    return oracle.slots(table[tokens], table[hyper["pad_id"]], factors, sizes, heads)


def expected_output(hyper, state, x, slots):
    """Returns the output of the definition, for the rows that it reads."""
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
