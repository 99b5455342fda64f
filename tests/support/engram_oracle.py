"""Computes the Engram layer in NumPy, from its definition: int64 hashes, float64 sums, token by token."""

import numpy as np


def is_prime(n):
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def table_sizes(wished, heads, layers):
    """Returns the primes of each layer's heads, orders first."""
    taken, sizes = set(), []
    for _ in range(layers):
        layer = []
        for size in wished:
            last = size - 1
            for _ in range(heads):
                last += 1
                while not is_prime(last) or last in taken:
                    last += 1
                taken.add(last)
                layer.append(last)
        sizes.append(layer)
    return sizes


def multipliers(seed, layer, num_canonical, max_order):
    bound = max(1, (2**63 - 1) // num_canonical // 2)
    return np.random.default_rng(seed + 10007 * layer).integers(0, bound, max_order, np.int64) * 2 + 1


def slots(ids, pad, factors, sizes, heads):
    """Returns (B, S, R) rows of the joint table, for canonical ids (B, S); orders 2 to len(factors)."""
    batch, length = ids.shape
    found = np.zeros((batch, length, len(sizes)), np.int64)
    first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    for b in range(batch):
        for t in range(length):
            mix = np.int64(0)
            for i, factor in enumerate(factors):
                token = np.int64(ids[b, t - i] if t >= i else pad)
                mix = mix ^ (token * factor)
                if i == 0:
                    continue
                for head in range(heads):
                    r = (i - 1) * heads + head
                    found[b, t, r] = mix % sizes[r] + first[r]
    return found


def rms_norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def layer(p, table, rows, hidden, dilation, gate_eps, conv_eps):
    """Returns the output (B, S, D) for rows (B, S, R) of the table (N, d) and hidden states (B, S, D).

    p has `value_projection`, `key_projection` (R·d, D), their biases, three gains, and `conv` (width, D), of
    which tap i looks i·dilation back.
    """
    p = {name: np.asarray(value, np.float64) for name, value in p.items()}
    e = np.asarray(table, np.float64)[rows].reshape(*rows.shape[:2], -1)
    value = e @ p["value_projection"] + p["value_bias"]
    key = e @ p["key_projection"] + p["key_bias"]
    g = rms_norm(key, p["gate_key_scale"], gate_eps) * rms_norm(hidden, p["gate_hidden_scale"], gate_eps)
    g = g.sum(-1, keepdims=True) / np.sqrt(hidden.shape[-1])
    u = value / (1 + np.exp(-np.sign(g) * np.sqrt(np.maximum(np.abs(g), 1e-6))))
    normed = rms_norm(u, p["conv_scale"], conv_eps)
    convolved = np.zeros_like(u)
    for i, tap in enumerate(p["conv"]):
        back = i * dilation
        convolved[:, back:] += tap * normed[:, : max(normed.shape[1] - back, 0)]
    return u + convolved / (1 + np.exp(-convolved))
