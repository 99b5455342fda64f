"""Makes state dicts of the authors' layers at random, with shapes written from their description."""

import chex
import numpy as np

from tests.support import authors_oracle as oracle

V1 = dict(
    layer="v1",
    hidden_size=10,
    knum=6,
    kdim=5,
    vdim=8,
    knn=3,
    head=1,
    tucker_rank=2,
    tucker_multihead=2,
    value_expand_time=4,
    norm_eps=1e-5,
)
V2 = V1 | dict(
    layer="v2",
    layers=3,
    pre_vdim=7,
    value_expand_time=1,
    key_expand_time=1,
    share_ratio=1.0,
    use_glu_act=False,
    q_for_each_tucker_rank=False,
    key_balance_reg_coef=0.0,
)
MEMORY_PLUS = dict(
    layer="memory_plus",
    hidden_size=10,
    knum=6,
    kdim=5,
    vdim=8,
    knn=3,
    head=2,
    layers=2,
    norm_eps=1e-5,
)

CASES = {
    "v1_plain": V1 | dict(value_expand_time=1, tucker_rank=1, tucker_multihead=1, norm_eps=1e-3),
    "v1_three_heads": V1 | dict(head=3),
    "v1_nine_blocks": V1 | dict(value_expand_time=9, tucker_rank=3, tucker_multihead=4, head=2),
    "v2_summed_gelu": V2 | dict(key_expand_time=2, share_ratio=0.5, use_glu_act=True),
    "v2_blocks_queries": V2
    | dict(key_expand_time=2, value_expand_time=4, share_ratio=0.4, q_for_each_tucker_rank=True, head=2),
    "v2_no_pre_values": V2 | dict(pre_vdim=0, key_balance_reg_coef=0.3, tucker_rank=3, tucker_multihead=1),
    "v2_everything": V2
    | dict(
        layers=2,
        key_expand_time=3,
        value_expand_time=9,
        share_ratio=0.7,
        tucker_rank=3,
        tucker_multihead=4,
        head=2,
        use_glu_act=True,
        q_for_each_tucker_rank=True,
        key_balance_reg_coef=0.05,
    ),
    "memory_plus": MEMORY_PLUS,
    "memory_plus_three_heads": MEMORY_PLUS | dict(head=3, layers=3),
}


def shapes(hyper: dict) -> dict[str, tuple[int, ...]]:
    """Returns shapes by name, without `shuffle_index` and the buffers of the singular vectors."""
    D, H, d_k, d_v = (hyper[name] for name in ("hidden_size", "head", "kdim", "vdim"))
    n = hyper["knum"]
    found: dict[str, tuple[int, ...]] = {}
    layers = 1 if hyper["layer"] == "v1" else hyper["layers"]
    slots = n * n * (layers if hyper["layer"] == "v2" else 1)
    for i in range(layers):
        prefix = "" if hyper["layer"] == "v1" else f"mem_blocks.{i}."
        found[prefix + "query_norm.weight"] = found[prefix + "keys_norm.weight"] = (d_k,)
        if hyper["layer"] == "memory_plus":
            found[prefix + "query_proj.weight"] = (H * 2 * d_k, D)
            found[prefix + "keys"] = (H, 2, n, d_k)
            found[prefix + "values_proj.weight"] = (D, d_v)
            found[prefix + "swilu_projection.weight"] = (d_v, D)
            continue
        r = hyper["tucker_rank"]
        queries = r if hyper.get("q_for_each_tucker_rank") else 1
        found[prefix + "query_proj.weight"] = (2 * queries * d_k, D)
        found[prefix + "keys"] = (H, 2, num_keys(hyper), d_k, r)
        found[prefix + "values_proj.weight"] = (D, hyper["value_expand_time"] * d_v)
        found |= {f"{prefix}tucker_core.{i}": (H, r, r) for i in range(hyper["tucker_multihead"])}
        if hyper.get("pre_vdim"):
            found[prefix + "pre_values_proj.weight"] = (hyper["pre_vdim"], D)
    table = "" if hyper["layer"] == "v1" else "full_memory_layer."
    found[table + "values_for_look_up"] = (slots, d_v)
    if hyper.get("pre_vdim"):
        found[table + "pre_values_for_look_up"] = (slots, hyper["pre_vdim"])
    return found


def num_keys(hyper: dict) -> int:
    """Returns the keys per side of the virtual grid."""
    if hyper["layer"] == "v1":
        return int(hyper["value_expand_time"] ** 0.5) * hyper["knum"]
    side = int((hyper["share_ratio"] * hyper["layers"] * hyper["knum"] ** 2) ** 0.5)
    return hyper["key_expand_time"] * side


def random_state(hyper: dict, seed: int) -> dict[str, np.ndarray]:
    """Returns a state of float32 arrays and, for the shuffle, one of int64."""
    rng = np.random.default_rng(seed)
    state = {}
    for name, shape in shapes(hyper).items():
        drawn = rng.normal(size=shape) / (shape[-1] ** 0.5 if name.endswith("proj.weight") else 1.0)
        state[name] = (1 + 0.3 * drawn if name.endswith("norm.weight") else drawn).astype(np.float32)
    for name in [name for name in state if name.endswith("tucker_core.0")]:
        prefix = name.removesuffix("tucker_core.0")
        cores = [state[f"{prefix}tucker_core.{i}"] for i in range(hyper["tucker_multihead"])]
        left, _, right = np.linalg.svd(np.sum(cores, axis=0, dtype=np.float64))
        sign = rng.choice((-1.0, 1.0), size=(len(left), 1))  # buffers may have either
        for vector, last in ((left[:, :, 0], "tucker_core_u"), (right[:, 0], "tucker_core_v")):
            state[prefix + last] = (vector * sign)[None, :, None].astype(np.float32)
        state[prefix + "shuffle_index"] = rng.permutation(num_keys(hyper) ** 2)
    return state


def case(name: str, tokens: tuple[int, int] = (2, 3)) -> tuple[dict, dict, np.ndarray, oracle.Result]:
    """Returns hyper-parameters, state, x and the oracle's result, where no choice depends on rounding."""
    hyper = CASES[name]
    shape = (*tokens, hyper["hidden_size"])
    for seed in range(50):
        state = random_state(hyper, seed)
        rng = np.random.default_rng(1000 + seed)
        x = rng.normal(size=shape if hyper["layer"] == "v1" else (hyper["layers"], *shape)).astype(np.float32)
        result = oracle.run(state, hyper, x.astype(np.float64))
        if result.gap > 1e-4:
            return hyper, state, x, result
    raise AssertionError("no seed keeps its candidates apart")


def equal_states(actual: dict, expected: dict) -> None:
    """Asserts that two state dicts hold the same arrays, of the same dtypes."""
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    chex.assert_trees_all_equal(actual, expected)
