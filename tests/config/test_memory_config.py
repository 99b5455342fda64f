"""Which windows of which tables memories read, and what a `MemoryConfig` refuses."""

import math

import pytest

from ultramem_jax.config import ModelConfig
from ultramem_jax.config.memory import MemorySite
from ultramem_jax.errors import UserError
from ultramem_jax.presets import families

SMALL = dict(num_keys=4, top_m=4, expansion=1)


def windows(memory, num_memories):
    """(window keys, rows of each table, first row of each window) of so many memories."""
    site = MemorySite.alone(memory, 16, num_memories=num_memories)
    firsts = tuple(window.first for window in site.layout.windows)
    return memory.address.window_keys(site), site.layout.num_slots, firsts


def test_memories_with_tables_of_their_own():
    memory = families.ultramem(num_keys=6, top_m=4, expansion=4)
    assert windows(memory, 3) == (6, (36, 36, 36), (0, 0, 0))
    sites = [MemorySite.alone(memory, 16, num_memories=3, index=i) for i in range(3)]
    assert [site.window.table for site in sites] == [0, 1, 2]
    assert memory.address.num_virtual_keys(sites[1]) == 12


def test_one_table_for_all():
    assert windows(families.ultramem(**SMALL, sharing="all"), 3) == (4, (16,), (0, 0, 0))


def test_a_ring_of_windows():
    # Half of 3·16 slots is 24: the largest square within it has 4 keys per side.
    assert windows(families.ultramem(**SMALL, sharing="ring", share_ratio=0.5), 3) == (4, (48,), (0, 16, 32))
    assert windows(families.ultramem(**SMALL, sharing="ring"), 3)[0] == 6  # √48 = 6.9


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
    memory = families.ultramem(**SMALL, sharing="blocks", share_ratio=ratio)
    keys, _, firsts = windows(memory, memories)
    assert firsts == offsets
    assert keys == math.isqrt(round(ratio * memories) * 16)


@pytest.mark.parametrize("sharing", ["none", "all", "ring", "blocks"])
def test_no_memory_at_all(sharing):
    memory = families.ultramem(**SMALL, sharing=sharing, placement="none")
    assert ModelConfig(memories={"memory": memory}).sites == ()


def _v2(**fields):
    return families.ultramem_v2(**dict(num_keys=4, top_m=4, pre_value_dim=8) | fields)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _v2(share_ratio=0.0), r"share_ratio = 0\.0: must be in \(0, 1\]"),
        (lambda: _v2(share_ratio=1.5), r"share_ratio = 1\.5: must be in \(0, 1\]"),
        (
            lambda: families.ultramem(share_ratio=0.5),
            r"share_ratio = 0\.5: .*and 1 unless sharing is 'ring'",
        ),
        (lambda: windows(_v2(sharing="blocks", share_ratio=0.5), 3), "must cut 3 memories into groups"),
        (lambda: windows(_v2(top_m=9), 4), "top_m = 9: must be at most the candidates of a side, .*= 8"),
        (lambda: windows(_v2(num_keys=30_000), 3), "a table of 2,700,000,000 slots"),
        (
            lambda: _v2(sharing="rings"),
            "unknown table.sharing 'rings': did you mean 'ring'",
        ),
        (lambda: families.ultramem(query_per_rank=True), "query_per_rank = True: must be False unless"),
        (lambda: families.ultramem(gate=True), "gate = True: must be False while 4 blocks"),
        (lambda: families.ultramem(pre_value_activation="gelu"), "pre_value_dim = 0: must be at least 1"),
        (lambda: families.ultramem(pre_value_dim=-1), "pre_value_dim = -1: must be at least 0"),
        (
            lambda: families.ultramem(value_lr_multiple=math.inf),
            "value_lr_multiple = inf: must be a finite number",
        ),
        (
            lambda: families.ultramem(balance_loss_weight=-0.1),
            "balance_loss_weight = -0.1: must be at least 0",
        ),
        (
            lambda: families.ultramem(tucker_rank=0, num_cores=1, share_keys=True),
            "share_keys = True: must be False while share_query is True and tucker_rank 0",
        ),
        (
            lambda: ModelConfig(
                embed_dim=128, memories={"memory": families.peer(value_dim=128, pre_value_dim=64)}
            ),
            "pre_value_dim = 64: must equal embed_dim = 128 while project_pre_values is False",
        ),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
