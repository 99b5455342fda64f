"""Costs of a step against hand-worked numbers."""

from dataclasses import replace

import pytest

from tests.support import counted
from ultramem_jax.accounting import PartCost, count_parameters, expected_rows, floor_seconds
from ultramem_jax.accounting.step_costs import memory_step_costs, model_step_cost, total
from ultramem_jax.config import DataConfig, ModelConfig, MoEConfig, RunConfig, TrainConfig
from ultramem_jax.errors import UserError

# One memory: n 3 (N 9), m 2, H 2 (R 4), d_k 4, d_v 4, E 4 (K 6), r 2, h 2, convolution 3 wide; D 8, T 5.
MEMORY = counted.MEMORY.changed(placement="1:1")
MODEL = ModelConfig(
    vocab_size=10, embed_dim=8, num_layers=1, num_heads=4, mlp_dim=6, memories={"memory": MEMORY}
)
CONFIG = RunConfig(model=MODEL, data=DataConfig(seq_len=5))
TOKENS = 5
ROWS = 9 * (1 - (8 / 9) ** 20)
"""About 8.15 of 9 rows are read by 5·4 reads."""
DENSE = 64 + 24 + 96 + 16 + 8 + 128
"""P: query, convolution, keys, cores, gains, projection."""


def with_memory(**changes):
    return replace(CONFIG, model=replace(MODEL, memories={"memory": MEMORY.changed(**changes)}))


def test_every_part_of_a_tiny_step():
    costs = memory_step_costs(CONFIG, TOKENS)
    # Query 8 x 2·4 weights and 8 x 3 taps.
    assert costs["query"] == PartCost(5 * 2 * (64 + 24), 4 * (64 + 24))
    # 2 sides x 2 heads x 6 keys of 4; stored are 2·2·2 sets of 6 keys of 2.
    assert costs["side_scores"] == PartCost(5 * 2 * 24 * 4, 4 * 96)
    # 2 sides x 2 heads x 2 candidates x 2 ranks, 2 wide each.
    assert costs["candidates"] == PartCost(5 * 2 * 8 * 2 * 2, 0)
    # Per head 2·4·2 + 2·2·4 for the grid and 2 cores · 2 cells · (8 + 4).
    assert costs["grid"] == PartCost(5 * 2 * (16 + 16 + 48), 0)
    assert costs["lookup"] == PartCost(5 * 2 * 4 * 4, round(ROWS * 16), round(ROWS * 16))
    assert costs["projection"] == PartCost(5 * 2 * 16 * 8, 4 * 128)
    assert costs["backward"] == PartCost(
        2 * (880 + 320 + 1280) + 160,
        round(ROWS * 16 + 4 * DENSE),
        round(ROWS * 16),
    )
    assert costs["row_gradients"] == PartCost(160, 0)
    assert costs["row_update"] == PartCost(0, round(2 * ROWS * 3 * 16), round(ROWS * 3 * 16))
    assert costs["dense_optimizer"] == PartCost(0, 28 * DENSE)


def test_the_total_is_the_sum_of_all_parts():
    costs = memory_step_costs(CONFIG, TOKENS)
    assert total(costs).flops == sum(part.flops for part in costs.values())
    assert total(costs).bytes == sum(part.bytes for part in costs.values())


def test_the_dense_way_moves_the_whole_table():
    config = replace(CONFIG, train=TrainConfig(table_gradient="dense"))
    costs, sparse = memory_step_costs(config, TOKENS), memory_step_costs(CONFIG, TOKENS)
    assert costs["row_gradients"] == PartCost(160, 4 * 9 * 4)
    assert costs["row_update"] == PartCost(0, 28 * 9 * 4)
    assert costs["lookup"] == sparse["lookup"] and costs["backward"] == sparse["backward"]


def test_rows_of_half_the_bytes_and_one_second_moment():
    train = TrainConfig(row_moment_dtype="bfloat16", row_second_moment="row")
    costs = memory_step_costs(replace(with_memory(dtype="bfloat16"), train=train), TOKENS)
    assert costs["lookup"].bytes == round(ROWS * 8)
    # Row and first moment 8 bytes each, the second moment 4.
    assert costs["row_update"].bytes == round(2 * ROWS * (8 + 8 + 4))


@pytest.mark.parametrize(
    ("rule", "kept"), [("adamw_catch_up", 36), ("adagrad", 16), ("adagrad_row", 4), ("sgd", 0)]
)
def test_every_rule_moves_what_it_keeps(rule, kept):
    config = replace(CONFIG, train=TrainConfig(row_optimizer=rule))
    assert memory_step_costs(config, TOKENS)["row_update"].bytes == round(2 * ROWS * (16 + kept))
    if rule != "adamw_catch_up":
        dense = replace(CONFIG, train=TrainConfig(row_optimizer=rule, table_gradient="dense"))
        assert memory_step_costs(dense, TOKENS)["row_update"].bytes == 9 * (3 * 16 + 2 * kept)


@pytest.mark.parametrize(("most", "rows"), [(3, 3), (1000, ROWS)])
def test_a_selection_updates_at_most_its_rows(most, rows):
    selecting = replace(CONFIG, train=TrainConfig(slots_per_step=most, slot_score="reads"))
    costs, whole = memory_step_costs(selecting, TOKENS), memory_step_costs(CONFIG, TOKENS)
    assert costs.pop("row_update") == PartCost(0, round(2 * rows * 3 * 16), round(rows * 3 * 16))
    assert costs.items() < whole.items()
    compared = replace(CONFIG, train=TrainConfig(slots_per_step=most, background="counts.npz"))
    moved = memory_step_costs(compared, TOKENS)["row_update"]
    assert moved.bytes == round(2 * rows * 3 * 16 + 4 * ROWS)
    assert moved.row_bytes == round(rows * 3 * 16 + 4 * ROWS)


def test_the_moments_of_muon_and_lion_move_as_well():
    # One moment instead of two, read and written: of the weights of products, or of all.
    p = count_parameters(CONFIG.model)
    matrices = p.memory_matrices
    found = {
        name: memory_step_costs(replace(CONFIG, train=TrainConfig(optimizer=name)), TOKENS)[
            "dense_optimizer"
        ].bytes
        for name in ("adamw", "muon", "lion")
    }
    assert found["adamw"] - found["muon"] == 8 * matrices and found["lion"] == 20 * DENSE


@pytest.mark.parametrize(
    ("changes", "width"),
    [
        ({}, 4),
        ({"rank_keys": "full"}, 4),  # one query of all ranks meets the sum of their keys
        ({"rank_keys": "full", "query_per_rank": True}, 8),
        ({"tucker_rank": 0, "num_cores": 1}, 4),
    ],
)
def test_the_width_of_the_product_that_chooses(changes, width):
    assert memory_step_costs(with_memory(**changes), TOKENS)["side_scores"].flops == 5 * 2 * 24 * width


def test_the_grid_of_sums():
    costs = memory_step_costs(with_memory(tucker_rank=0, num_cores=1), TOKENS)
    assert costs["grid"].flops == 5 * 2 * (4 + 2)


def test_the_rest_of_a_model_goes_forward_once_and_backward_twice():
    rest = model_step_cost(CONFIG, TOKENS)
    memory = total(memory_step_costs(CONFIG, TOKENS))
    # Attention 2·8·8 + 2·8·8, MLP 2·8·6, logits 10·8 weights; scores 2·8·(5 + 1).
    assert rest.flops - memory.flops == 3 * 5 * (2 * (256 + 96 + 80) + 96)
    # The embedding is the output too; 3 gains of 8.
    assert rest.bytes - memory.bytes == 4 * 9 * (256 + 96 + 80 + 24)


def test_distinct_rows():
    assert expected_rows(1, 7) == 1
    assert expected_rows(9, 1) == pytest.approx(1)
    assert expected_rows(9, 20) == pytest.approx(ROWS)
    assert expected_rows(10**9, 1000) == pytest.approx(1000, rel=1e-5)


def test_the_floor_is_the_slower_of_computing_and_moving():
    assert floor_seconds(PartCost(100, 10), 50, 20) == 2
    assert floor_seconds(PartCost(100, 100), 50, 20) == 5
    # 60 bytes at 20 a second, and 40 of rows at 10.
    assert floor_seconds(PartCost(100, 100, 40), 50, 20, 10) == 7
    assert floor_seconds(PartCost(100, 100, 40), 50, 20) == 5


@pytest.mark.parametrize(
    "model",
    [
        replace(MODEL, memories={}),
        replace(MODEL, num_layers=2, memories={"memory": MEMORY.changed(placement="full")}),
        replace(MODEL, memories={"memory": MEMORY.changed(pre_value_dim=4)}),
        replace(MODEL, memories={"memory": MEMORY.changed(gate=True, sum_blocks=True)}),
    ],
)
def test_other_models_are_refused(model):
    with pytest.raises(UserError, match=r"model\.memories: the cost of a step is counted"):
        memory_step_costs(replace(CONFIG, model=model), TOKENS)


def test_experts_and_no_tokens_are_refused():
    with pytest.raises(UserError, match="tokens = 0"):
        memory_step_costs(CONFIG, 0)
    with pytest.raises(UserError, match=r"model\.moe"):
        model_step_cost(replace(CONFIG, model=replace(MODEL, moe=MoEConfig(num_experts=4))), TOKENS)
