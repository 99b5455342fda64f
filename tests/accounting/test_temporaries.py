"""Temporaries of steps, derived from shapes: each term by hand."""

from dataclasses import replace

import pytest

from ultramem_jax.accounting import count_parameters
from ultramem_jax.accounting.temporaries import decoding_temporaries, training_temporaries
from ultramem_jax.config import DataConfig, MeshConfig, ModelConfig, MoEConfig, RunConfig, TrainConfig
from ultramem_jax.presets import families

ALONE = {"data": 1, "fsdp": 1, "tensor": 1, "memory": 1, "width": 1}
DENSE = ModelConfig(vocab_size=100, embed_dim=16, num_layers=3, num_heads=4, num_kv_heads=2, mlp_dim=64)
MEMORY = families.ultramem(
    placement="1:2", num_keys=10, top_m=5, num_heads=2, key_dim=8, value_dim=8, query_conv_width=4
)
MANY = 1 << 40


def _run(model, batch_size=4, seq_len=32, **train):
    return RunConfig(model, DataConfig(seq_len=seq_len), TrainConfig(batch_size=batch_size, **train))


def test_a_dense_model():
    model = replace(DENSE, dtype="bfloat16", dropout=0.1)
    parts = training_temporaries(_run(model), ALONE, MANY, False)
    tokens = 4 * 32
    # Both norms' inputs and results, queries and pooled values: 6·16; keys and values: 2·8; pooled in
    # float32.
    of_token = 2 * (6 * 16 + 2 * 8) + 4 * 16 + 2 * 2 * 64
    assert parts["activations of layers"] == 3 * tokens * of_token
    # 5/8 of the weights are computed: in float32, in bfloat16, and whether dropout kept them.
    assert parts["attention weights"] == 3 * 4 * 4 * 32 * 32 * 5 // 8 * (4 + 2 + 1)
    assert parts["logits"] == 4 * tokens * 100
    assert parts["gradients"] == 4 * count_parameters(model).total
    assert parts["reads and pooled values"] == parts["choice of rows"] == parts["weights of groups"] == 0


def test_what_changes_the_activations():
    plain = training_temporaries(_run(DENSE), ALONE, MANY, False)
    gated = training_temporaries(_run(replace(DENSE, mlp="swiglu")), ALONE, MANY, False)
    assert gated["activations of layers"] - plain["activations of layers"] == 3 * 128 * 4 * 64
    halves = training_temporaries(_run(DENSE, grad_accumulation=2), ALONE, MANY, False)
    assert halves["activations of layers"] * 2 == plain["activations of layers"]
    shared = training_temporaries(_run(DENSE), ALONE | {"data": 4}, MANY, False)
    assert shared["logits"] * 4 == plain["logits"] and shared["gradients"] == plain["gradients"]


def test_remat():
    plain = training_temporaries(_run(DENSE), ALONE, MANY, False)
    layers = training_temporaries(_run(DENSE, remat="layers"), ALONE, MANY, False)
    # Every layer keeps its input; the one that is computed again has all of its activations.
    input_bytes = 128 * 4 * 16
    assert layers["activations of layers"] == plain["activations of layers"] // 3 + 3 * input_bytes
    assert layers["attention weights"] * 3 == plain["attention weights"]
    products = training_temporaries(_run(DENSE, remat="products"), ALONE, MANY, False)
    # Input, queries, output of attention, keys and values, and the MLP before its function and after.
    more = 128 * 4 * (2 * 16 + 2 * 8 + 64 + 16)
    assert products["activations of layers"] == layers["activations of layers"] + 3 * more


def test_a_scan_stacks_the_weights_of_its_layers():
    model = replace(DENSE, scan_layers=True, dtype="bfloat16")
    of_layer = 2 * 16 * 16 + 2 * 16 * 8 + 2 * 16 * 64
    parts = training_temporaries(_run(model), ALONE, MANY, False)
    assert parts["stacked weights"] == 2 * 3 * of_layer
    plain = training_temporaries(_run(replace(model, scan_layers=False)), ALONE, MANY, False)
    # Of every token and layer, the inner activations three times more, and three arrays of norms.
    more = parts["activations of layers"] - plain["activations of layers"]
    assert more == 128 * 3 * 3 * (2 * 64 + 4 * 16)
    again = training_temporaries(_run(model, remat="layers"), ALONE, MANY, False)
    unscanned = training_temporaries(
        _run(replace(model, scan_layers=False), remat="layers"), ALONE, MANY, False
    )
    assert again["activations of layers"] == unscanned["activations of layers"]
    # The memory reads after layer 1 and lands after layer 2: nothing is left to scan.
    apart = training_temporaries(_run(replace(model, memories={"memory": MEMORY})), ALONE, MANY, False)
    assert apart["stacked weights"] == 0
    assert training_temporaries(_run(DENSE), ALONE, MANY, False)["stacked weights"] == 0


def test_a_memory():
    model = replace(DENSE, memories={"memory": MEMORY})
    parts = training_temporaries(_run(model), ALONE, MANY, False)
    tokens, reads, keys = 128, 2 * 5, 20
    # Slot and block of a read, two weights and their cotangents; pooled values of 4 blocks and cotangents.
    of_reads = reads * (4 + 4 + 2 * 2 * 4) + 4 * 2 * 4 * 8
    # Queries before and after their norm; candidates: an index and 2 scores; cells the same; the convolution.
    addressing = 4 * 2 * (2 * 8) + 4 * (2 * 2 * 5 * 3 + 2 * 5 * 3) + 4 * 16
    assert parts["reads and pooled values"] == tokens * (of_reads + addressing)
    assert parts["choice of rows"] == 4 * tokens * 2 * 2 * 3 * keys
    few = training_temporaries(_run(model), ALONE, 1000, False)
    assert few["choice of rows"] == 4 * 1000


def test_the_moment_when_rows_are_updated():
    wide = replace(DENSE, vocab_size=2, memories={"memory": MEMORY.changed(value_dim=4096)})
    parts = training_temporaries(_run(wide), ALONE, MANY, False)
    assert parts["rows of the largest table"] == 3 * 4 * 128 * 10 * 4096
    assert set(parts) == {"gradients", "reads and pooled values", "rows of the largest table"}
    # Owners of a split table see the reads of all tokens of their group.
    config = replace(_run(wide), mesh=MeshConfig(data=2, memory=2))
    split = training_temporaries(config, ALONE | {"data": 2, "memory": 2}, MANY, False)
    assert split["rows of the largest table"] == parts["rows of the largest table"] / 2


def test_rows_on_a_tpu_are_padded_and_parts_lie_side_by_side():
    v2 = families.ultramem_v2(num_keys=6, top_m=3, key_dim=8, value_dim=4000, pre_value_dim=200)
    model = replace(DENSE, vocab_size=2, num_layers=1, memories={"memory": v2})
    reads = 128 * model.sites[0].config.reads_per_token
    for multiple, width in ((1, 4200), (128, 4096 + 256)):
        parts = training_temporaries(_run(model), ALONE, MANY, False, row_multiple=multiple)
        assert parts["rows of the largest table"] == 3 * 4 * reads * width


def test_tokens_that_are_chosen_by_ranks():
    plain = decoding_temporaries(DENSE, 3, 8, False)
    ranks = decoding_temporaries(DENSE, 3, 8, False, by_ranks=True)
    assert ranks["logits"] == 2 * plain["logits"] == 4 * 4 * 3 * 100


def test_shared_tables_have_the_reads_of_all_memories():
    v2 = families.ultramem_v2(
        num_keys=6, top_m=3, key_dim=8, value_dim=4096, pre_value_dim=8, share_ratio=1.0
    )
    model = replace(DENSE, vocab_size=2, memories={"memory": v2})
    parts = training_temporaries(_run(model), ALONE, MANY, False)
    assert len(model.sites) > 1
    assert parts["rows of the largest table"] == 3 * 4 * 128 * 3 * (4096 + 8) * len(model.sites)


def test_experts():
    model = replace(DENSE, moe=MoEConfig(num_experts=8, top_k=2, expert_dim=24), dtype="bfloat16")
    parts = training_temporaries(_run(model), ALONE, MANY, True)
    of_token = 2 * (6 * 16 + 2 * 8) + 4 * 16 + 2 * 2 * (2 * 16 + 2 * 24) + 4 * 16
    assert parts["activations of layers"] == 3 * 128 * of_token
    # 256 assignments to 8 experts: groups of 16 rows, 16 and one more for each expert.
    assert parts["weights of groups"] == 2 * (16 + 8) * 16 * 24 * 2
    on_four = training_temporaries(
        replace(_run(model), mesh=MeshConfig(memory=4)), ALONE | {"memory": 4}, MANY, False
    )
    counted = count_parameters(model)
    assert on_four["gradients"] == 4 * (counted.dense + counted.experts // 4)
    assert on_four["weights of groups"] == 0


def test_decoding():
    model = replace(DENSE, memories={"memory": MEMORY})
    parts = decoding_temporaries(model, batch_size=8, cache_length=64, groups_experts=False)
    assert parts["attention weights"] == 8 * 4 * 64 * 2 * 4
    assert parts["logits"] == 2 * 4 * 8 * 100
    assert parts["choice of rows"] == 4 * 8 * 2 * 2 * 3 * 20
    assert sum(parts.values()) == pytest.approx(
        sum(decoding_temporaries(model, 16, 64, False).values()) / 2, rel=1e-9
    )
