"""Fair counterparts of an UltraMem model: dense, MoE and PKM models of equal compute and equal sparse size.

What is matched, each within a tolerance:

- FLOPs of a token, `Flops.matched`: the papers' count (two per weight that a token is multiplied by) plus the
  scoring and lookup of memories. Attention scores and logits stay out: with D, L, V and S in common they are
  the same for all systems, so they would only make a difference look smaller. Lookups are in, because a match
  on the papers' count alone would give memories their reads for free.
- Sparse parameters: all experts' weights against all tables. A dense model has none.

Everything that is not part of a system (D, L, attention, vocabulary, dropout) is taken from the base.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from math import isqrt

from ultramem_jax.accounting import count_parameters, flops_per_token
from ultramem_jax.config import MemoryConfig, ModelConfig, MoEConfig
from ultramem_jax.errors import UserError, unknown

SYSTEMS = ("ultramem", "dense", "moe", "pkm")
"""What `match` can build; `ultramem` is the base itself."""

TOLERANCE = 0.02
"""Largest relative difference in FLOPs and in sparse parameters."""

_TOP_K = 2
"""Experts of a token in the UltraMem paper's baseline."""
_PKM_HEADS = 2
"""Heads of the paper's PKM, each with its own query (from the counts of table 2)."""
_MIN_KEY_DIM = 8
"""Narrower keys hardly tell slots apart; below, the MLP gives way instead."""
_MAX_KEY_DIM_MULTIPLE = 4
"""Keys at most this many times D wide (the paper's PKM: 2.4); beyond, the MLP takes the rest."""
_STEPS = (8, 1)
"""Widths are multiples of 8 where that matches well, any integer where not."""
_GOOD_SHARE = 0.25
"""A match is good, and the search for rounder numbers ends, within this share of the tolerance."""


def match(base: ModelConfig, system: str, *, tolerance: float = TOLERANCE) -> ModelConfig:
    """The counterpart of an UltraMem model.

    `dense`: an MLP wide enough for the compute of the memories. `moe`: top-2 experts of the base's kind of
    MLP; their width and number are free. `pkm`: Product-Key Memory as published, one memory in the middle
    layer, with values as wide as the model and as many reads per token as all memories of the base together
    (as far as its n keys per side allow); n and the width of the keys are free, and so is the width of the
    MLP where keys would be too narrow or too wide.

    Args:
        base: a model with a memory.
        system: one of `SYSTEMS`.
        tolerance: largest relative difference of either count.

    Raises:
        UserError: an unknown system, a base without a memory, or no shape that matches.
    """
    if system not in SYSTEMS:
        raise unknown("system", system, SYSTEMS)
    if base.memory is None or base.moe is not None:
        raise UserError(f"no {system} model can be matched: the base must have a memory and no experts")
    if system == "ultramem":
        return base
    candidates: dict[str, Callable[[ModelConfig, int], Iterator[ModelConfig]]] = {
        "dense": _dense,
        "moe": _moe,
        "pkm": _pkm,
    }
    best, least = None, float("inf")
    for step in _STEPS:
        for candidate in candidates[system](base, step):
            difference = max(differences(base, candidate).values())
            if difference < least:
                best, least = candidate, difference
        if best is not None and least <= _GOOD_SHARE * tolerance:
            return best
    if best is None:
        raise UserError(f"no {system} model is as small as the base ({_describe(base)})")
    if least > tolerance:
        off = ", ".join(f"{name} off by {part:.1%}" for name, part in differences(base, best).items())
        raise UserError(
            f"no {system} model matches the base ({_describe(base)}) within {tolerance:.1%}; "
            f"the nearest ({_describe(best)}) has {off}"
        )
    return best


def match_all(base: ModelConfig, *, tolerance: float = TOLERANCE) -> dict[str, ModelConfig]:
    """The base and its counterparts, by system.

    Raises:
        UserError: as `match`.
    """
    return {system: match(base, system, tolerance=tolerance) for system in SYSTEMS}


def differences(base: ModelConfig, other: ModelConfig) -> dict[str, float]:
    """Relative differences of `other` from `base`, as shares of the base's.

    Returns:
        `FLOPs per token`, and `sparse parameters` if both models have any.
    """
    flops, target = flops_per_token(other).matched, flops_per_token(base).matched
    off = {"FLOPs per token": abs(flops - target) / target}
    sparse, sparse_target = count_parameters(other).sparse, count_parameters(base).sparse
    if sparse and sparse_target:
        off["sparse parameters"] = abs(sparse - sparse_target) / sparse_target
    return off


def verify_match(configs: Mapping[str, ModelConfig], tolerance: float = TOLERANCE) -> None:
    """Checks that models may be compared: all match the first one.

    Args:
        configs: models by name, the one that the others were matched to first. Where that one has no sparse
            parameters, the first that has some stands for them.
        tolerance: largest relative difference of either count; models without sparse parameters are compared
            by FLOPs alone.

    Raises:
        UserError: names the two models, what differs and by how much.
    """
    sparse = [name for name, config in configs.items() if count_parameters(config).sparse]
    for reference in dict.fromkeys([*list(configs)[:1], *sparse[:1]]):
        for name, config in configs.items():
            for what, off in differences(configs[reference], config).items():
                if off > tolerance:
                    raise UserError(
                        f"{name} does not match {reference}: {what} differ by {off:.1%}, allowed are "
                        f"{tolerance:.1%} ({_describe(config)}; {_describe(configs[reference])})"
                    )


def _describe(config: ModelConfig) -> str:
    flops, sparse = flops_per_token(config).matched, count_parameters(config).sparse
    return f"{flops:,} FLOPs per token, {sparse:,} sparse parameters"


def _around(value: float, step: int, low: int) -> list[int]:
    """The multiples of `step` next to `value`, below and above, that are at least `low`."""
    below = int(value // step) * step
    return [multiple for multiple in (below, below + step) if multiple >= low]


def _mlp_widths(config: ModelConfig, target: int, step: int) -> Iterator[ModelConfig]:
    """`config` with the MLP widths that bring it nearest to `target` FLOPs."""
    # FLOPs are linear in the width of the MLP, so two points say everything.
    fixed = flops_per_token(dataclasses.replace(config, mlp_dim=1)).matched
    slope = flops_per_token(dataclasses.replace(config, mlp_dim=2)).matched - fixed
    for mlp_dim in _around(1 + (target - fixed) / slope, step, low=step):
        yield dataclasses.replace(config, mlp_dim=mlp_dim)


def _dense(base: ModelConfig, step: int) -> Iterator[ModelConfig]:
    plain = dataclasses.replace(base, memory=None)
    yield from _mlp_widths(plain, flops_per_token(base).matched, step)


def _moe(base: ModelConfig, step: int) -> Iterator[ModelConfig]:
    target, sparse = flops_per_token(base).matched, count_parameters(base).sparse

    def model(num_experts: int, expert_dim: int) -> ModelConfig:
        experts = MoEConfig(num_experts, _TOP_K, expert_dim, activation=base.mlp)
        return dataclasses.replace(base, memory=None, moe=experts)

    one = count_parameters(model(_TOP_K, 1)).experts // _TOP_K
    # Equal sparse size fixes number × width, and compute picks the pair. The widest experts tried have all
    # the FLOPs of the base.
    for expert_dim in range(step, target // (_TOP_K * one) + step, step):
        for num_experts in _around(sparse / (one * expert_dim), 1, low=_TOP_K):
            yield model(num_experts, expert_dim)


def _pkm(base: ModelConfig, step: int) -> Iterator[ModelConfig]:
    assert base.memory is not None
    target, sparse = flops_per_token(base).matched, count_parameters(base).sparse
    d = base.embed_dim
    middle = (base.num_layers + 1) // 2
    reads = len(base.spans) * base.memory.num_heads * base.memory.top_m

    def model(num_keys: int, key_dim: int) -> ModelConfig:
        memory = MemoryConfig.pkm(
            placement=f"{middle}:{middle}",
            num_keys=num_keys,
            # As many reads as there are, up to the m <= n that the exactness of product keys needs.
            top_m=max(min(reads // _PKM_HEADS, num_keys), 1),
            num_heads=_PKM_HEADS,
            key_dim=key_dim,
            value_dim=d,
        )
        return dataclasses.replace(base, memory=memory)

    for num_keys in _around(isqrt(sparse // d), 1, low=1):
        fixed = flops_per_token(model(num_keys, 1)).matched
        slope = flops_per_token(model(num_keys, 2)).matched - fixed
        wanted = 1 + (target - fixed) / slope
        widest = _MAX_KEY_DIM_MULTIPLE * d
        if _MIN_KEY_DIM <= wanted <= widest:
            for key_dim in _around(wanted, step, low=_MIN_KEY_DIM):
                yield model(num_keys, key_dim)
        else:
            key_dim = _MIN_KEY_DIM if wanted < _MIN_KEY_DIM else widest
            yield from _mlp_widths(model(num_keys, key_dim), target, step)
