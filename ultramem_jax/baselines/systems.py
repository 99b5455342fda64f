"""Defines the baselines of an UltraMem model: for each system, the shapes that could match a base.

`BASELINES` has one generator per system. Given a base and a step of widths, it yields the few models that are
nearest to the base in FLOPs per token and sparse parameters. `ultramem_jax.baselines.matching` chooses among
them. There are two searches: one over experts (their number and width), and one over memories (n, and the
width of keys or of the MLP). The `MemoryConfig` of a system with memories fixes everything else.

All systems take D, L, attention, vocabulary and dropout from the base. Systems with memories also take its
kind of MLP.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

from ultramem_jax.accounting import count_parameters, flops_per_token
from ultramem_jax.config import MemoryConfig, ModelConfig, MoEConfig
from ultramem_jax.config.field_types import FieldValue
from ultramem_jax.config.memory_parts import AddressConfig
from ultramem_jax.presets import families

Candidates = Callable[[ModelConfig, int], Iterator[ModelConfig]]
"""Generator (base, step) -> models near the base; the widths of MLPs, experts and keys are multiples of
`step`."""

_TOP_K = 2
"""Experts per token in the UltraMem paper's baseline."""
_FINE_TOP_K = 8
"""Experts per token in OLMoE, 8 of 64."""
_PKM_HEADS = 2
"""Heads of the paper's PKM, each with its own query (from the counts of table 2). Memory+ has the same number
in the UltraMemV2 paper."""
_PEER_HEADS = range(8, 3, -1)
"""Heads of PEER: 8 as published, or else the largest number that divides the base's reads."""
_V2_PAPER_LR_MULTIPLE = 4.0
"""Initial learning-rate multiple of values in the UltraMemV2 authors' runs of all memory models, including
Memory+. The improved PKM also has it here."""
_V2_SHARE_RATIO = 0.5
"""Part of the ring that one memory of UltraMemV2 reads."""
_V2_WIDTHS = 4
"""Quotient of D and the width of UltraMemV2's keys, values and pre-values (192 at D = 768)."""
_SOME_SLOTS = 10_000
"""Number of slots at which the parameters of a slot are first counted."""
_ROW_MULTIPLE = 64
"""Multiple that the rows of a hashed table are rounded up to, so that up to 64 owners can divide them."""
_MIN_KEY_DIM = 8
"""Smallest width of keys. Narrower keys hardly distinguish slots; then the MLP becomes narrower instead."""
_MAX_KEY_DIM_MULTIPLE = 4
"""Largest width of keys in multiples of D (the paper's PKM has 2.4). Beyond it, the MLP takes the rest."""


def reads_per_token(config: ModelConfig) -> int:
    """Returns the number of rows that a token reads, over all memories of a model."""
    return sum(site.config.reads_per_token for site in config.sites)


def _around(value: float, step: int, low: int) -> list[int]:
    """Returns the multiples of `step` next to `value`, below and above, that are at least `low`."""
    below = int(value // step) * step
    return [multiple for multiple in (below, below + step) if multiple >= low]


def _mlp_widths(config: ModelConfig, target: int, step: int) -> Iterator[ModelConfig]:
    """Yields the model with the MLP widths whose FLOPs are nearest to `target`."""
    # FLOPs are linear in the width of the MLP, so two widths determine them.
    fixed = flops_per_token(dataclasses.replace(config, mlp_dim=1)).matched
    slope = flops_per_token(dataclasses.replace(config, mlp_dim=2)).matched - fixed
    for mlp_dim in _around(1 + (target - fixed) / slope, step, low=step):
        yield dataclasses.replace(config, mlp_dim=mlp_dim)


def _dense(base: ModelConfig, step: int) -> Iterator[ModelConfig]:
    """Yields dense models whose MLPs take the compute of the base's memories."""
    plain = dataclasses.replace(base, memories={})
    yield from _mlp_widths(plain, flops_per_token(base).matched, step)


def _experts(kind: Callable[[ModelConfig], MoEConfig]) -> Candidates:
    """Returns the search over experts; `kind` fixes everything except for their number and width."""

    def candidates(base: ModelConfig, step: int) -> Iterator[ModelConfig]:
        target, sparse, moe = flops_per_token(base).matched, count_parameters(base).sparse, kind(base)

        def model(num_experts: int, expert_dim: int) -> ModelConfig:
            experts = dataclasses.replace(moe, num_experts=num_experts, expert_dim=expert_dim)
            return dataclasses.replace(base, memories={}, moe=experts)

        one = count_parameters(model(moe.top_k, 1)).experts // moe.top_k
        # Equal sparse size fixes number × width, and compute selects the pair. The widest experts of the
        # search would use all FLOPs of the base.
        for expert_dim in range(step, target // (moe.top_k * one) + step, step):
            for num_experts in _around(sparse / (one * expert_dim), 1, low=moe.top_k):
                yield model(num_experts, expert_dim)

    return candidates


def _memories(
    name: str, kind: Callable[[ModelConfig], MemoryConfig], *, free_widths: bool = True
) -> Candidates:
    """Returns the search over memories; `kind` fixes everything except for slots, reads and one width.

    Sparse size fixes the slots. Compute fixes the width that sets the addresser's cost, which is d_k for
    product keys. If the addresser has no such width, if `free_widths` is False, or if the width would be too
    small or too large, compute fixes the width of the MLP instead. The reads of the base are divided among
    the memories, as far as their addressers allow.
    """

    def candidates(base: ModelConfig, step: int) -> Iterator[ModelConfig]:
        target, sparse, memory = flops_per_token(base).matched, count_parameters(base).sparse, kind(base)
        plain = dataclasses.replace(base, memories={})

        def model(address: AddressConfig) -> ModelConfig:
            return dataclasses.replace(plain, memories={name: dataclasses.replace(memory, address=address)})

        def with_reads(address: AddressConfig) -> ModelConfig:
            memories = len(model(address.with_reads(1)).sites)
            wanted = reads_per_token(base) // memories
            site = model(address.with_reads(1)).sites[0]
            return model(address.with_reads(min(wanted, address.most_reads(site))))

        def per_slot(address: AddressConfig) -> float:
            """Returns the sparse parameters of the model divided by the slots of one memory."""
            return count_parameters(model(address.with_reads(1))).sparse / address.own_slots

        # Memories with small hashed tables differ in size, so the estimate is repeated near the result.
        about = memory.address.near_slots(sparse / per_slot(memory.address.near_slots(_SOME_SLOTS)[0]))[0]
        for address in memory.address.near_slots(sparse / per_slot(about)):
            width = address.widths() if free_widths else None
            if width is None:
                yield from _mlp_widths(with_reads(address), target, step)
                continue
            of_width = width[1]
            narrowest, widest = _MIN_KEY_DIM, _MAX_KEY_DIM_MULTIPLE * base.embed_dim
            # FLOPs are also linear in this width.
            fixed = flops_per_token(with_reads(of_width(1))).matched
            slope = flops_per_token(with_reads(of_width(2))).matched - fixed
            wanted = 1 + (target - fixed) / slope
            if narrowest < wanted < widest:
                for multiple in _around(wanted, step, low=narrowest):
                    yield with_reads(of_width(multiple))
            else:
                nearest = narrowest if wanted <= narrowest else widest
                yield from _mlp_widths(with_reads(of_width(nearest)), target, step)

    return candidates


def _spread(base: ModelConfig, memories: int) -> str:
    """Returns a placement of memories at a regular interval, each of which reads and adds in the same layer.

    Each memory is in the middle of its share of the layers, so a single memory is in the middle layer.
    """
    layers = (-(-(2 * i + 1) * base.num_layers // (2 * memories)) for i in range(memories))
    return "/".join(f"{layer}:{layer}" for layer in layers)


def _pkm(base: ModelConfig, **improved: FieldValue) -> MemoryConfig:
    """Returns the PKM of a base, with some fields changed."""
    return families.pkm(
        placement=_spread(base, 1), num_heads=_PKM_HEADS, value_dim=base.embed_dim, **improved
    )


def _memory_plus(base: ModelConfig) -> MemoryConfig:
    """Returns the Memory+ of a base."""
    placement = _spread(base, len(base.sites))
    return families.memory_plus(
        placement=placement,
        num_heads=_PKM_HEADS,
        value_dim=base.embed_dim,
        value_lr_multiple=_V2_PAPER_LR_MULTIPLE,
    )


def _peer(base: ModelConfig) -> MemoryConfig:
    """Returns the PEER memory of a base."""
    divisors = (heads for heads in _PEER_HEADS if reads_per_token(base) % heads == 0)
    return families.peer(
        placement=_spread(base, 1),
        num_heads=next(divisors, _PEER_HEADS[0]),
        value_dim=base.embed_dim,
        pre_value_dim=base.embed_dim,
    )


def _ultramem_v2(base: ModelConfig) -> MemoryConfig:
    """Returns the UltraMemV2 memory of a base."""
    # The width is even, because two cores share a value.
    width = max(base.embed_dim // (2 * _V2_WIDTHS), 1) * 2
    return families.ultramem_v2(
        key_dim=max(base.embed_dim // _V2_WIDTHS, _MIN_KEY_DIM),
        value_dim=width,
        pre_value_dim=width,
        # A single memory with a share of a half would leave half of its table unread.
        share_ratio=_V2_SHARE_RATIO if base.num_layers > 1 else 1.0,
    )


def engram_beside(base: ModelConfig, reads: int) -> MemoryConfig:
    """Returns an Engram memory for a model, with its places, reads and widths, and the default rows per head.

    It reads before layer 2 and before the middle layer, as published (2 and 15 of 30). The rows that a token
    reads of one order are together D/2 wide (1,280 at D 2,560 in the paper).

    Args:
        base: the model.
        reads: most rows that a token reads over all memories; orders and heads may allow only fewer.
    """
    layers = sorted({min(2, base.num_layers), min(max(round(base.num_layers / 2), 3), base.num_layers)})
    heads = max(reads // (2 * len(layers)), 1)
    return families.engram(
        placement="/".join(f"before@{layer}" for layer in layers),
        heads_per_order=heads,
        value_dim=max(base.embed_dim // 2 // heads, 1),
        row_multiple=_ROW_MULTIPLE,
    )


BASELINES: dict[str, Candidates] = {
    "dense": _dense,
    "moe": _experts(lambda base: MoEConfig(top_k=_TOP_K, activation=base.mlp)),
    "moe-fine": _experts(
        lambda base: MoEConfig(
            top_k=_FINE_TOP_K, activation="swiglu", normalize_gates=False, auxiliary_over_layers="mean"
        )
    ),
    "pkm": _memories("pkm", _pkm),
    "pkm-improved": _memories(
        "pkm", partial(_pkm, norm_query=True, norm_keys=True, value_lr_multiple=_V2_PAPER_LR_MULTIPLE)
    ),
    "memory-plus": _memories("memory_plus", _memory_plus),
    "peer": _memories("peer", _peer),
    "ultramem-v2": _memories("ultramem_v2", _ultramem_v2, free_widths=False),
    "engram": _memories("engram", lambda base: engram_beside(base, reads_per_token(base))),
}
"""Generators of candidates for `matching.match`, by system:

- `dense`: an MLP wide enough for the compute of the memories.
- `moe`: top-2 experts of the base's kind of MLP (the UltraMem paper's baseline).
- `moe-fine`: top-8 SwiGLU experts, gates not normalised, losses that are means over the layers (OLMoE, arXiv
  2409.02060).
- `pkm`: Product-Key Memory as published: one memory in the middle layer, 2 heads, values D wide.
- `pkm-improved`: PKM with norms of queries and keys, and values that initially learn at 4 times the rate.
- `memory-plus`: Memory+ with the number of memories of the base, at a regular interval; 2 heads, values D
  wide, which initially learn at 4 times the rate.
- `peer`: PEER, one memory in the middle layer, 8 heads (or fewer, down to 4, if 8 do not divide the reads),
  values and pre-values D wide.
- `ultramem-v2`: UltraMemV2, a memory in every layer, each reading half a ring; 1 head, and keys, values and
  pre-values D/4 wide, so that the MLP takes the rest of the compute.
- `engram`: Engram before layer 2 and before the middle layer; bigrams and trigrams, whose rows are D/2 wide
  per order and learn at 5 times the rate; the MLP takes the rest of the compute.
"""
