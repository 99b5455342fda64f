"""Computes the authors' layers in float64 NumPy, from a state dict in their names, without the package.

Token by token, in the order of their forward passes. What the project computes anew, such as the singular
vectors, is read here from the buffers.
"""

import math
from typing import NamedTuple

import numpy as np

from tests.support.oracle import gelu, softmax


class Result(NamedTuple):
    output: np.ndarray
    """The output, with the shape of x."""
    slots: np.ndarray
    """(layers, T, H·m)."""
    blocks: np.ndarray
    """(layers, T, H·m)."""
    balance: float
    """The balance loss of all layers, without its coefficient."""
    gap: float
    """By how much the nearest lost candidate lost, over all choices that were made."""


def run(state: dict, hyper: dict, x: np.ndarray) -> Result:
    state = {k: v if k.endswith("shuffle_index") else np.asarray(v, np.float64) for k, v in state.items()}
    layers = 1 if hyper["layer"] == "v1" else hyper["layers"]
    stacked = x if hyper["layer"] != "v1" else x[None]
    outputs, slots, blocks, balance, gaps = [], [], [], 0.0, [math.inf]
    for i in range(layers):
        tokens = stacked[i].reshape(-1, x.shape[-1])
        if hyper["layer"] == "memory_plus":
            layer = MemoryPlus(state, hyper, f"mem_blocks.{i}.", gaps)
        else:
            layer = UltraMem(state, hyper, i, gaps)
        found = [layer.token(token) for token in tokens]
        outputs.append(np.array([f[0] for f in found]).reshape(stacked[i].shape))
        slots.append([f[1] for f in found])
        blocks.append([f[2] for f in found])
        balance += layer.balance() if hyper.get("key_balance_reg_coef") else 0.0
    output = np.array(outputs)
    return Result(
        output if hyper["layer"] != "v1" else output[0],
        np.array(slots),
        np.array(blocks),
        balance,
        min(gaps),
    )


def objective(state: dict, hyper: dict, x: np.ndarray, cotangent: np.ndarray) -> float:
    """Returns what the authors' backward pass differentiates: Σ output · cotangent, and the hooked loss."""
    result = run(state, hyper, x)
    hooked = hyper.get("key_balance_reg_coef", 0.0) * result.balance
    return float((result.output * cotangent).sum() + hooked)


def top(scores: np.ndarray, count: int, gaps: list) -> np.ndarray:
    order = np.argsort(-scores, kind="stable")
    if count < len(scores):
        gaps.append(scores[order[count - 1]] - scores[order[count]])
    return order[:count]


def rms(vector: np.ndarray, gain: np.ndarray, hyper: dict) -> np.ndarray:
    return gain * vector / math.sqrt(np.mean(vector**2) + hyper["norm_eps"])


class UltraMem:
    """Computes one layer of V1 or V2."""

    def __init__(self, state: dict, hyper: dict, index: int, gaps: list):
        self.hyper, self.gaps = hyper, gaps
        self.v2 = hyper["layer"] == "v2"
        prefix = f"mem_blocks.{index}." if self.v2 else ""
        table = "full_memory_layer." if self.v2 else ""
        self.part = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        self.values = state[table + "values_for_look_up"]
        self.pre_values = state.get(table + "pre_values_for_look_up")
        own = hyper["knum"] ** 2
        self.window = own
        self.offset = index * own
        if self.v2:
            self.window = int((len(self.values) * hyper["share_ratio"]) ** 0.5) ** 2
        heads, sides, self.num_keys, _, self.rank = self.part["keys"].shape
        self.keys = np.zeros_like(self.part["keys"])
        for h, s, k, r in np.ndindex(heads, sides, self.num_keys, self.rank):
            key = self.part["keys"][h, s, k, :, r]
            self.keys[h, s, k, :, r] = rms(key, self.part["keys_norm.weight"], hyper)
        self.probabilities = np.zeros((2, self.num_keys))
        self.counts = np.zeros((2, self.num_keys))
        self.seen = 0

    def token(self, x: np.ndarray) -> tuple[np.ndarray, list, list]:
        hyper, part, m, h = self.hyper, self.part, self.hyper["knn"], self.hyper["tucker_multihead"]
        own_query = self.v2 and hyper["q_for_each_tucker_rank"]
        queries = (part["query_proj.weight"] @ x).reshape(2, -1, hyper["kdim"])
        expansion = hyper["key_expand_time"] ** 2 if self.v2 else hyper["value_expand_time"]
        pooled = np.zeros((expansion, hyper["vdim"]))
        slots, blocks = [], []
        for head in range(hyper["head"]):
            scores = np.zeros((2, self.rank, self.num_keys))
            for side, rank in np.ndindex(2, self.rank):
                query = rms(queries[side, rank if own_query else 0], part["query_norm.weight"], hyper)
                scores[side, rank] = self.keys[head, side, :, :, rank] @ query
            candidates = []
            for side, name in enumerate(("tucker_core_u", "tucker_core_v")):
                rough = part[name][0, head, 0] @ scores[side]
                candidates.append(top(rough, m, self.gaps))
                self.probabilities[side] += softmax(rough)
                self.counts[side][candidates[-1]] += 1
            self.seen += 1
            cores = [part[f"tucker_core.{i}"][head] for i in range(h)]
            rows, columns = scores[0][:, candidates[0]], scores[1][:, candidates[1]]
            grids = np.array([rows.T @ core @ columns for core in cores])
            for cell in top(grids.sum(0).ravel(), m, self.gaps):
                i, j = divmod(cell, m)
                address = part["shuffle_index"][candidates[0][i] * self.num_keys + candidates[1][j]]
                slot = (address % self.window + self.offset) % len(self.values)
                weight = grids[:, i, j]
                if self.pre_values is not None:
                    inner = float(self.pre_values[slot] @ (part["pre_values_proj.weight"] @ x))
                    weight = weight * (gelu(inner) if hyper["use_glu_act"] else inner)
                slices = self.values[slot].reshape(h, -1) * weight[:, None]
                pooled[address // self.window] += slices.reshape(-1)
                slots.append(slot)
                blocks.append(address // self.window)
        if self.v2 and hyper["value_expand_time"] == 1:
            pooled = pooled.sum(0)
        return part["values_proj.weight"] @ pooled.reshape(-1), slots, blocks

    def balance(self) -> float:
        shares = self.counts / self.counts.sum(axis=1, keepdims=True)
        return float(self.num_keys * (shares * self.probabilities / self.seen).sum())


class MemoryPlus:
    """Computes one layer of Memory+, whose norm of the keys is not used."""

    def __init__(self, state: dict, hyper: dict, prefix: str, gaps: list):
        self.hyper, self.gaps = hyper, gaps
        self.part = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        self.values = state["full_memory_layer.values_for_look_up"]

    def token(self, x: np.ndarray) -> tuple[np.ndarray, list, list]:
        hyper, part, m, n = self.hyper, self.part, self.hyper["knn"], self.hyper["knum"]
        queries = (part["query_proj.weight"] @ x).reshape(hyper["head"], 2, hyper["kdim"])
        pooled, slots = np.zeros(hyper["vdim"]), []
        for head in range(hyper["head"]):
            row, column = (
                part["keys"][head, side] @ rms(queries[head, side], part["query_norm.weight"], hyper)
                for side in range(2)
            )
            grid = (row[:, None] + column).ravel()
            cells = top(grid, m, self.gaps)
            for weight, cell in zip(softmax(grid[cells]), cells, strict=True):
                pooled += weight * self.values[cell]
                slots.append(int(cell))
        assert max(slots) < n * n
        gate = part["swilu_projection.weight"] @ x
        return part["values_proj.weight"] @ (pooled * gate / (1 + np.exp(-gate))), slots, [0] * len(slots)

    def balance(self) -> float:
        return 0.0
