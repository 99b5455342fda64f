"""Which windows of which tables memories read, and what a `MemoryConfig` refuses."""

import math

import pytest

from ultramem_jax.config import MemoryConfig, ModelConfig
from ultramem_jax.errors import UserError

SMALL = dict(num_keys=4, top_m=4, expansion=1)


def test_memories_with_tables_of_their_own():
    layout = MemoryConfig(num_keys=6, top_m=4, expansion=4).layout(3)
    assert (layout.window_keys, layout.num_virtual_keys) == (6, 12)
    assert (layout.num_tables, layout.num_slots, layout.offsets) == (3, 36, (0, 0, 0))


def test_one_table_for_all():
    layout = MemoryConfig(**SMALL, table_sharing="all").layout(3)
    assert (layout.num_tables, layout.num_slots, layout.offsets) == (1, 16, (0, 0, 0))
    assert layout.window_slots == 16


def test_a_ring_of_windows():
    # Half of 3·16 slots is 24: the largest square within it has 4 keys per side.
    layout = MemoryConfig(**SMALL, table_sharing="ring", share_ratio=0.5).layout(3)
    assert (layout.window_keys, layout.num_tables, layout.num_slots) == (4, 1, 48)
    assert layout.offsets == (0, 16, 32)
    assert MemoryConfig(**SMALL, table_sharing="ring").layout(3).window_keys == 6  # √48 = 6.9


@pytest.mark.parametrize(
    ("memories", "ratio", "offsets"),
    [
        (4, 0.5, (0, 0, 32, 32)),
        (3, 1 / 3, (0, 16, 32)),
        (3, 0.3333, (0, 16, 32)),  # as one types it
        (49, 1 / 49, tuple(range(0, 49 * 16, 16))),
        (2, 1.0, (0, 0)),
    ],
)
def test_blocks_of_neighbours(memories, ratio, offsets):
    layout = MemoryConfig(**SMALL, table_sharing="blocks", share_ratio=ratio).layout(memories)
    assert layout.offsets == offsets
    assert layout.window_keys == math.isqrt(round(ratio * memories) * 16)


@pytest.mark.parametrize("sharing", ["none", "all", "ring", "blocks"])
def test_no_memory_at_all(sharing):
    memory = MemoryConfig(**SMALL, table_sharing=sharing, placement="none")
    assert ModelConfig(memory=memory).layout.num_tables == 0


def _v2(**fields):
    return MemoryConfig.ultramem_v2(**dict(num_keys=4, top_m=4, pre_value_dim=8) | fields)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _v2(share_ratio=0.0), r"share_ratio = 0\.0: must be in \(0, 1\]"),
        (lambda: _v2(share_ratio=1.5), r"share_ratio = 1\.5: must be in \(0, 1\]"),
        (
            lambda: MemoryConfig(share_ratio=0.5),
            r"share_ratio = 0\.5: .*and 1 unless table_sharing is 'ring'",
        ),
        (lambda: _v2(table_sharing="blocks", share_ratio=0.5).layout(3), "must cut 3 memories into groups"),
        (lambda: _v2(top_m=9).layout(4), "top_m = 9: must be at most the candidates of a side, .*= 8"),
        (lambda: _v2(num_keys=30_000).layout(3), "a table of 2,700,000,000 slots"),
        (
            lambda: _v2(table_sharing="rings"),
            "unknown model.memory.table_sharing 'rings': did you mean 'ring'",
        ),
        (lambda: MemoryConfig(query_per_rank=True), "query_per_rank = True: must be False unless"),
        (lambda: MemoryConfig(gate=True), "gate = True: must be False while expansion is 4"),
        (lambda: MemoryConfig(pre_value_activation="gelu"), "pre_value_dim = 0: must be at least 1"),
        (lambda: MemoryConfig(pre_value_dim=-1), "pre_value_dim = -1: must be at least 0"),
        (lambda: MemoryConfig(value_lr_multiple=math.inf), "value_lr_multiple = inf: .*finite"),
        (lambda: MemoryConfig(balance_loss_weight=-0.1), "balance_loss_weight = -0.1: must be at least 0"),
        (
            lambda: MemoryConfig(tucker_rank=0, num_cores=1, share_keys=True),
            "share_keys = True: must be False while share_query is True and tucker_rank 0",
        ),
        (
            lambda: ModelConfig(embed_dim=128, memory=MemoryConfig.peer(value_dim=128, pre_value_dim=64)),
            "pre_value_dim = 64: must equal embed_dim = 128 while project_pre_values is False",
        ),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
