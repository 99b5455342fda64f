"""Fair counterparts of an UltraMem model: its baselines, at equal compute and equal sparse size.

What is matched, each within a tolerance:

- FLOPs of a token, `Flops.matched`: the papers' count (two per weight that a token is multiplied by) plus the
  scoring and lookup of memories. Attention scores and logits stay out: with D, L, V and S in common they are
  the same for all systems, so they would only make a difference look smaller. Lookups are in, because a match
  on the papers' count alone would give memories their reads for free.
- Sparse parameters: all experts' weights against all tables, pre-values among them. A dense model has none.
- Reads of a token over all memories, as far as heads and keys per side allow. They are what is left of
  compute and traffic that a FLOP count hardly sees, so they are set beforehand and no tolerance applies.

Everything that is not part of a system (D, L, attention, vocabulary, dropout) is taken from the base. What
the systems are is in `ultramem_jax.baselines.systems`.
"""

from collections.abc import Mapping

from ultramem_jax.accounting import count_parameters, flops_per_token
from ultramem_jax.baselines.allocation import with_table_share
from ultramem_jax.baselines.systems import BASELINES
from ultramem_jax.config import ModelConfig
from ultramem_jax.errors import UserError, unknown

SYSTEMS = ("ultramem", *BASELINES)
"""What `match` can build; `ultramem` is the base itself."""

COMBINED = ("ultramem-engram", "moe-engram")
"""Systems of two kinds of sparse parameters: the first gives up a share of its own to an Engram table."""

TABLE_SHARE = 0.25
"""The share of the table in a combination: 20 to 25 % was best in the Engram paper (arXiv 2601.07372)."""

TOLERANCE = 0.02
"""Largest relative difference in FLOPs and in sparse parameters."""

_STEPS = (8, 1)
"""Widths are multiples of 8 where that matches well, any integer where not."""
_GOOD_SHARE = 0.25
"""A match is good, and the search for rounder numbers ends, within this share of the tolerance."""


def match(
    base: ModelConfig, system: str, *, tolerance: float = TOLERANCE, table_share: float = TABLE_SHARE
) -> ModelConfig:
    """Returns the counterpart of an UltraMem model; `baselines.systems.BASELINES` says what each system is.

    Args:
        base: a model with a memory.
        system: one of `SYSTEMS` or `COMBINED`.
        tolerance: largest relative difference of either count.
        table_share: of a combined system, the share of sparse parameters in its Engram table.

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
        alone = match(base, system.removesuffix("-engram"), tolerance=tolerance)
        combined = with_table_share(alone, table_share)
        verify_match({"ultramem": base, system: combined}, tolerance)
        return combined
    best, least = None, float("inf")
    for step in _STEPS:
        for candidate in BASELINES[system](base, step):
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
