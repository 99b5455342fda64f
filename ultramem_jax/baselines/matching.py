"""Finds fair baselines of an UltraMem model, with equal compute and equal sparse size.

A baseline matches the base in three counts:

- FLOPs of a token within a tolerance, `Flops.matched`: the papers' count (two per weight that a token is
  multiplied by) plus the scoring and lookup of memories. Attention scores and logits are left out. They are
  the same for all systems of equal D, L, V and S, so they would only make a difference look smaller. Lookups
  are included, because a match of only the papers' count would give memories their reads for free.
- Sparse parameters within a tolerance: the weights of all experts against all tables, including pre-values. A
  dense model has none.
- Reads of a token over all memories, as far as heads and keys per side allow. A FLOP count hardly shows their
  compute and traffic. They are set before the search, so no tolerance applies.

Everything that is not part of a system (D, L, attention, vocabulary, dropout) comes from the base.
`ultramem_jax.baselines.systems` defines the systems.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from ultramem_jax.accounting import count_parameters, flops_per_token
from ultramem_jax.baselines.allocation import with_table_share
from ultramem_jax.baselines.systems import BASELINES
from ultramem_jax.config import ModelConfig
from ultramem_jax.errors import UserError, unknown

SYSTEMS = ("ultramem", *BASELINES)
"""Names of the systems that `match` can build; `ultramem` is the base itself."""

COMBINED = ("ultramem-engram", "moe-engram")
"""Names of combined systems, in which an Engram table takes a share of the sparse parameters."""

TABLE_SHARE = 0.25
"""Share of the table in a combined system; 20 to 25 % was best in the Engram paper (arXiv 2601.07372)."""

TOLERANCE = 0.02
"""Largest relative difference in FLOPs and in sparse parameters."""

_STEPS = (8, 1)
"""Steps of widths, in the order in which they are tried: multiples of 8, or any integer if no multiple of 8
matches well."""
_GOOD_SHARE = 0.25
"""Share of the tolerance within which a match is good; a good match ends the search."""


def match(
    base: ModelConfig, system: str, *, tolerance: float = TOLERANCE, table_share: float = TABLE_SHARE
) -> ModelConfig:
    """Returns the baseline of an UltraMem model; `baselines.systems.BASELINES` describes each system.

    Args:
        base: a model with a memory.
        system: one of `SYSTEMS` or `COMBINED`.
        tolerance: largest relative difference of either count.
        table_share: share of the Engram table in the sparse parameters of a combined system.

    Raises:
        UserError: an unknown system, a base without a memory, or no shape that matches.
    """
    if system not in (*SYSTEMS, *COMBINED):
        raise unknown("system", system, (*SYSTEMS, *COMBINED))
    if not base.memories or base.moe is not None:
        raise UserError(f"no {system} model can be matched: the base must have a memory and no experts")
    if system == "ultramem":
        return base
    if system in COMBINED:
        without_table = match(base, system.removesuffix("-engram"), tolerance=tolerance)
        combined = with_table_share(without_table, table_share)
        verify_match({"ultramem": base, system: combined}, tolerance)
        return combined
    best, least = None, _Rank(True, True, math.inf)
    for step in _STEPS:
        for candidate in BASELINES[system](base, step):
            rank = _rank(base, candidate, tolerance)
            if rank < least:
                best, least = candidate, rank
        if best is not None and not least.mostly_routes and least.difference <= _GOOD_SHARE * tolerance:
            return best
    if best is None:
        raise UserError(f"no {system} model is as small as the base ({_describe(base)})")
    if max(differences(base, best).values()) > tolerance:
        off = ", ".join(f"{name} off by {part:.1%}" for name, part in differences(base, best).items())
        raise UserError(
            f"no {system} model matches the base ({_describe(base)}) within {tolerance:.1%}; "
            f"the nearest ({_describe(best)}) has {off}"
        )
    return best


def match_all(base: ModelConfig, *, tolerance: float = TOLERANCE) -> dict[str, ModelConfig]:
    """Returns the base and all its baselines, by system.

    Raises:
        UserError: as in `match`.
    """
    return {system: match(base, system, tolerance=tolerance) for system in SYSTEMS}


def differences(base: ModelConfig, other: ModelConfig) -> dict[str, float]:
    """Returns the relative differences of `other` from `base`, as shares of the base's counts.

    Returns:
        name of a count -> difference, for `FLOPs per token`, and for `sparse parameters` if both models have
        any.
    """
    flops, target = flops_per_token(other).matched, flops_per_token(base).matched
    off = {"FLOPs per token": abs(flops - target) / target}
    sparse, sparse_target = count_parameters(other).sparse, count_parameters(base).sparse
    if sparse and sparse_target:
        off["sparse parameters"] = abs(sparse - sparse_target) / sparse_target
    return off


def verify_match(configs: Mapping[str, ModelConfig], tolerance: float = TOLERANCE) -> None:
    """Checks that a comparison of models is fair: all match the first one.

    Args:
        configs: models by name. The first one is the model that the others were matched to. If it has no
            sparse parameters, sparse sizes are compared with the first model that has some.
        tolerance: largest relative difference of either count. Models without sparse parameters are compared
            only by FLOPs.

    Raises:
        UserError: a model does not match; the message names both models, the count and the difference.
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


class _Rank(NamedTuple):
    """Orders candidates: the least is the best.

    Compute and sparse size have two solutions with experts: few wide ones, or many narrow ones whose router
    takes the rest of the compute. The second is matched only where the first does not exist.
    """

    is_too_far: bool
    """Whether a count differs by more than the tolerance."""
    mostly_routes: bool
    difference: float
    """Larger difference of the two counts."""


def _rank(base: ModelConfig, candidate: ModelConfig, tolerance: float) -> _Rank:
    flops, difference = flops_per_token(candidate), max(differences(base, candidate).values())
    return _Rank(difference > tolerance, flops.router > flops.feed_forward, difference)


def _describe(config: ModelConfig) -> str:
    """Returns the two matched counts of a model, for messages."""
    flops, sparse = flops_per_token(config).matched, count_parameters(config).sparse
    return f"{flops:,} FLOPs per token, {sparse:,} sparse parameters"
