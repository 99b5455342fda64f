"""Slots or width: which way to split a table sends and reads less."""

import pytest

from experiments.configs import slots_1b
from ultramem_jax.accounting import exchange_bytes
from ultramem_jax.planning.hardware import HARDWARE
from ultramem_jax.planning.partition import crossover, partition_costs, verdict


def test_the_paper_sends_less_from_the_parts_on_that_the_formulas_say():
    site = slots_1b.get_config().model.sites[0]
    costs = partition_costs(site, 4096, HARDWARE["h100"], 256)
    assert list(costs) == [2, 4, 8, 16, 32, 64, 128, 256]
    assert "width" in costs[64] and "width" not in costs[128]  # of 64 columns
    # (P-1)/P·R·(4 + b·d_v) < (P-1)·(R·(5 + h·b) + E·d_v·b) where P > 32·132 / (32·9 + 512) = 5.3; and by
    # width where (P-1)·R·9 + (P-1)/P·512 is more: P > (32·132 - 512) / (32·9) = 12.9.
    assert crossover(costs, "paper_number_wise", "slots", lambda cost: cost.sent) == 8
    assert crossover(costs, "paper_number_wise", "width", lambda cost: cost.sent) == 16
    assert crossover(costs, "slots", "width", lambda cost: cost.sent) is None
    assert crossover(costs, "width", "slots", lambda cost: cost.sent) == 2
    assert costs[8]["slots"].sent == exchange_bytes(site, 4096, 8).slots == 7 * 4096 * 800
    words = verdict(costs)
    assert "`paper, by dimension` for P = 2 to 16" in words and "from P = 32 on" in words


def test_below_the_smallest_access_width_reads_more_with_every_part():
    costs = partition_costs(slots_1b.get_config().model.sites[0], 4096, HARDWARE["h100"], 64)
    reads = 4096 * 32
    assert {parts: ways["slots"].read for parts, ways in costs.items()} == dict.fromkeys(costs, reads * 128)
    # Rows of 128 bytes in 4 parts are accesses of 32; in 64 parts 2 bytes cost as much.
    assert [costs[parts]["width"].read / (reads * 128) for parts in costs] == [1, 1, 2, 4, 8, 16]
    cost = costs[64]["width"]
    assert cost.seconds == pytest.approx(cost.sent / 50e9 + cost.read / 3.35e12)
    assert costs[8]["slots"].seconds == pytest.approx(costs[8]["slots"].sent / 450e9 + reads * 128 / 3.35e12)
