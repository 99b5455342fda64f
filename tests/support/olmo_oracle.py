"""Computes the authors' whole models in float64 from their definition, on random state dicts."""

import math
from typing import NamedTuple

import numpy as np

from tests.support import authors_oracle, synthetic
from tests.support.oracle import softmax

WIDTH, HEADS, KV_HEADS, INNER, ROWS = 12, 2, 1, 7, 24
MODEL = dict(
    d_model=WIDTH,
    n_heads=HEADS,
    n_kv_heads=KV_HEADS,
    n_layers=3,
    mlp_hidden_size=2 * INNER,
    vocab_size=20,
    embedding_size=ROWS,
    max_sequence_length=64,
    rope=True,
    rope_theta=500,
    include_bias=False,
    bias_for_layer_norm=False,
    layer_norm_type="rms",
    layer_norm_eps="1e-3",  # as PyYAML reads 1e-3
    attention_layer_norm=True,
    attention_dropout=0.0,
    mem_insert_way="no_mem",
)
V1 = synthetic.V1 | dict(hidden_size=WIDTH, head=2, norm_eps=1e-3)
V2 = synthetic.CASES["v2_everything"] | dict(
    layers=3, hidden_size=WIDTH, key_expand_time=2, value_expand_time=4, tucker_rank=2, tucker_multihead=2
)
V2 |= dict(norm_eps=1e-3, vdim=8, pre_vdim=6)
MEMORY_PLUS = synthetic.MEMORY_PLUS | dict(hidden_size=WIDTH, norm_eps=1e-3, head=3)
EXPERTS, TOP = 5, 2


class Case(NamedTuple):
    model: dict
    hyper: dict | None = None
    spans: tuple[tuple[int, int], ...] = ()
    """Layers in which each memory reads and after which it is added, from 0."""


CASES = {
    "v1": Case(MODEL | dict(mem_type="ultramem_v1", mem_insert_way="0:1/2:2"), V1, ((0, 1), (2, 2))),
    "v2": Case(MODEL | dict(mem_insert_way="full", weight_tying=False), V2, ((0, 0), (1, 1), (2, 2))),
    "memory_plus": Case(
        MODEL | dict(mem_type="memory_plus", mem_insert_way="1:1/0:0", attention_layer_norm=False),
        MEMORY_PLUS,
        ((1, 1), (0, 0)),
    ),
    "moe": Case(
        MODEL
        | dict(block_type="moe", moe_num_experts=EXPERTS, moe_top_k=TOP, mlp_hidden_size=None)
        | dict(mlp_ratio=1, weight_tying=False, moe_loss_weight=0.01, n_layers=2)
    ),
}


def section(case: Case) -> dict:
    """Returns the fields of the config, those of memories included."""
    of_memory = {
        f"mem_{name}": value
        for name, value in (case.hyper or {}).items()
        if name not in ("layer", "layers", "hidden_size", "norm_eps", "tucker_rank", "tucker_multihead")
    }
    return of_memory | case.model


def random_state(case: Case, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns a state dict of the model, with norms of queries over each head."""
    model, rng = case.model, np.random.default_rng(seed)
    inner = INNER if model["mlp_hidden_size"] else WIDTH // 2
    head = WIDTH // HEADS
    shapes = {"wte": (ROWS, WIDTH), "ln_f": (WIDTH,)}
    if not model.get("weight_tying", True):
        shapes["ff_out"] = (ROWS, WIDTH)
    for i in range(model["n_layers"]):
        of_layer = {
            "attn_norm": (WIDTH,),
            "ff_norm": (WIDTH,),
            "att_proj": (WIDTH + 2 * KV_HEADS * head, WIDTH),
            "attn_out": (WIDTH, WIDTH),
        }
        if model["attention_layer_norm"]:
            of_layer |= {"q_norm": (head,), "k_norm": (head,)}
        if model.get("block_type") == "moe":
            of_layer["ffn.router.layer"] = (EXPERTS, WIDTH)
            of_layer |= {f"ffn.experts.mlp.{name}": (EXPERTS * inner, WIDTH) for name in ("w1", "v1", "w2")}
        else:
            of_layer |= {"ff_proj": (2 * inner, WIDTH), "ff_out": (WIDTH, inner)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in of_layer.items()}
    state = {}
    for name, shape in shapes.items():
        drawn = rng.normal(size=shape) * (0.3 if len(shape) == 1 else 0.6)
        full = f"transformer.{name}" + ("" if ".mlp." in name else ".weight")
        state[full] = (drawn + (len(shape) == 1)).astype(np.float32)
    if case.hyper and case.hyper["layer"] == "v1":
        for i in range(len(case.spans)):
            layer = synthetic.random_state(case.hyper, seed + i)
            state |= {f"transformer.mem_blocks.{i}.{name}": array for name, array in layer.items()}
    elif case.hyper:
        layers = synthetic.random_state(case.hyper, seed)
        state |= {f"transformer.{name}": array for name, array in layers.items()}
    # Memories add about as much as the rest. Outputs that outweigh it make the logits depend on rounding.
    return {
        name: 0.05 * array if name.endswith(".values_for_look_up") else array for name, array in state.items()
    }


def forward(case: Case, state: dict, ids: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns the logits (S, V) of one sequence, and by how much the nearest lost candidate lost."""
    float64 = {name: array.astype(np.float64) for name, array in state.items() if array.dtype != np.int64}
    memories = Memories(case, state)
    x, landing = float64["transformer.wte.weight"][ids], {}
    for i in range(case.model["n_layers"]):
        prefix = f"transformer.blocks.{i}."
        part = {
            name.removeprefix(prefix).removesuffix(".weight"): array
            for name, array in float64.items()
            if name.startswith(prefix)
        }
        x = x + attention(part, rms(x, part["attn_norm"]))
        h = rms(x, part["ff_norm"])
        x = x + (experts(part, h, memories.gaps) if "ffn.router.layer" in part else mlp(part, h))
        for index, (start, end) in enumerate(case.spans):
            if start == i:
                landing[end] = memories.output(index, h)
        x = x + landing.pop(i, 0.0)
    output = float64.get("transformer.ff_out.weight", float64["transformer.wte.weight"])
    return rms(x, float64["transformer.ln_f.weight"]) @ output.T, min(memories.gaps)


def rms(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * gain


def attention(part: dict, x: np.ndarray) -> np.ndarray:
    """Attends query by query. Feature i of a head turns with i + d/2."""
    size, head = len(x), WIDTH // HEADS
    q, k, v = np.split(x @ part["att_proj"].T, [WIDTH, WIDTH + KV_HEADS * head], axis=1)
    q, k, v = q.reshape(size, HEADS, head), k.reshape(size, KV_HEADS, head), v.reshape(size, KV_HEADS, head)
    if "q_norm" in part and len(part["q_norm"]) == head:
        q, k = rms(q, part["q_norm"]), rms(k, part["k_norm"])
    elif "q_norm" in part:
        q = rms(q.reshape(size, -1), part["q_norm"]).reshape(q.shape)
        k = rms(k.reshape(size, -1), part["k_norm"]).reshape(k.shape)
    turn = np.exp(1j * np.arange(size)[:, None, None] * 500.0 ** (-np.arange(head // 2) / (head // 2)))
    q, k = ((y[..., : head // 2] + 1j * y[..., head // 2 :]) * turn for y in (q, k))
    pooled = np.zeros((size, HEADS, head))
    for position, a in np.ndindex(size, HEADS):
        b = a * KV_HEADS // HEADS
        scores = (q[position, a].conj() * k[: position + 1, b]).sum(-1).real / math.sqrt(head)
        pooled[position, a] = softmax(scores) @ v[: position + 1, b]
    return pooled.reshape(size, WIDTH) @ part["attn_out"].T


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def mlp(part: dict, x: np.ndarray) -> np.ndarray:
    inner, gate = np.split(x @ part["ff_proj"].T, 2, axis=1)
    return (silu(gate) * inner) @ part["ff_out"].T


def experts(part: dict, x: np.ndarray, gaps: list) -> np.ndarray:
    """Sums the experts with the gates of a softmax over all, token by token."""
    w1, v1, w2 = (np.split(part[f"ffn.experts.mlp.{name}"], EXPERTS) for name in ("w1", "v1", "w2"))
    y = np.zeros_like(x)
    for t, token in enumerate(x):
        gates = softmax(part["ffn.router.layer"] @ token)
        for e in authors_oracle.top(gates, TOP, gaps):
            y[t] += gates[e] * (silu(w1[e] @ token) * (v1[e] @ token)) @ w2[e]
    return y


class Memories:
    """Computes single layers by the oracle of the authors' layers."""

    def __init__(self, case: Case, state: dict):
        self.hyper, self.gaps = case.hyper, [math.inf]
        self.state = {
            name.removeprefix("transformer."): array if array.dtype == np.int64 else array.astype(np.float64)
            for name, array in state.items()
        }

    def output(self, index: int, h: np.ndarray) -> np.ndarray:
        prefix = f"mem_blocks.{index}."
        if self.hyper["layer"] == "memory_plus":
            layer = authors_oracle.MemoryPlus(self.state, self.hyper, prefix, self.gaps)
        elif self.hyper["layer"] == "v2":
            layer = authors_oracle.UltraMem(self.state, self.hyper, index, self.gaps)
        else:
            own = {k.removeprefix(prefix): v for k, v in self.state.items() if k.startswith(prefix)}
            layer = authors_oracle.UltraMem(own, self.hyper, 0, self.gaps)
        return np.array([layer.token(token)[0] for token in h])
