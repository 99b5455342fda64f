"""`bench_decode`: that what it times is a step of decoding, and what it writes and refuses."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench_decode.model import (
    full_cache,
    part_programs,
    random_variables,
    served_in,
    sparse_over_dense,
    step_program,
    with_sparsity,
)
from experiments.bench_decode.records import DecodeStudy
from experiments.common import machine
from ultramem_jax import presets
from ultramem_jax.config import MoEConfig
from ultramem_jax.models import Transformer
from ultramem_jax.models.serving import prepare_for_decoding
from ultramem_jax.presets import preset

TINY = served_in(preset("ultramem-tiny"), "float32")
MOE = replace(preset("moe-tiny"), num_layers=2, moe=MoEConfig(num_experts=3, top_k=2, expert_dim=32))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(machine, "product_flops_per_second", lambda dtype: 1e9)
    monkeypatch.setattr(machine, "read_bytes_per_second", lambda: 1e8)


@pytest.mark.parametrize("name", ["ultramem-tiny", "ultramem-v2-tiny", "pkm-tiny"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_weights_are_what_preparing_a_model_gives(name, dtype):
    config = served_in(preset(name), dtype)

    def made():
        variables = Transformer(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
        parts = {part: variables[part] for part in ("params", "memory", "buffers") if part in variables}
        return prepare_for_decoding(config, parts)

    found = random_variables(config)
    expected = jax.eval_shape(made)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), found) == jax.tree.map(
        lambda a: (a.shape, a.dtype), expected
    )
    table = next(iter(jax.tree.leaves(found["memory"])))
    numbers = table if dtype == "float32" else jax.lax.bitcast_convert_type(table, jnp.bfloat16)
    assert float(numbers.astype(jnp.float32).std()) == pytest.approx(0.02, rel=0.01)
    # No two rows are alike: they would lie in the processor's cache.
    assert len(np.unique(np.asarray(table[:4096, 0]))) > (4000 if dtype == "float32" else 200)


def test_the_step_is_one_of_decoding_on_a_cache_that_stays_full():
    variables, (kept, counters) = random_variables(TINY), full_cache(TINY, 3, 5, "float32")
    tokens = jnp.array([1, 2, 3], jnp.int32)
    before = jax.tree.map(jnp.copy, kept)
    logits, left = jax.jit(
        lambda variables, cache: Transformer(TINY).apply(
            variables | {"cache": cache}, tokens[:, None], counts=jnp.ones(3, jnp.int32), mutable=["cache"]
        )
    )(variables, before | counters)
    kept, following, chosen = step_program(TINY)(variables, kept, counters, tokens)
    chex.assert_trees_all_equal(following, logits.argmax(-1))
    assert float(chosen.experts) == 0
    reads = TINY.memory.address.num_heads * TINY.memory.address.top_m
    assert [slots.shape for slots in chosen.slots.values()] == [(3, reads)] * len(TINY.sites)
    rows = [set(np.asarray(slots).ravel().tolist()) for slots in chosen.slots.values()]
    assert chosen.distinct_rows() == sum(map(len, rows)) > len(TINY.sites) * TINY.memory.address.top_m
    # The place before the last holds what it held, the last one the token's own keys.
    keys, old = (tree["layer_1"]["attention"]["keys"] for tree in (kept, before))
    chex.assert_trees_all_equal(keys[:, :4], old[:, :4])
    chex.assert_trees_all_equal(keys, left["cache"]["layer_1"]["attention"]["keys"])
    assert (keys[:, 4] != old[:, 4]).any()


def test_the_parts_are_those_of_the_model():
    x = jax.random.normal(jax.random.key(0), (2, 1, TINY.embed_dim))
    for config, parts in ((TINY, {"attention", "feed_forward", "logits", "memory"}), (MOE, None)):
        variables = random_variables(config)
        programs = part_programs(config)
        assert set(programs) == (parts or {"attention", "feed_forward", "logits"})
        for name, program in programs.items():
            kept, counters = full_cache(config, 2, 4, "float32")
            kept, y = program(variables, kept, counters, x)
            chex.assert_shape(y, (2,) if name == "logits" else x.shape, custom_message=name)
            chex.assert_tree_all_finite(y)


def test_chosen_experts_are_counted():
    kept, counters = full_cache(MOE, 2, 4, "float32")
    variables = random_variables(MOE)
    # A router of zeros sends everyone to the first two.
    for layer in ("layer_1", "layer_2"):
        router = variables["params"][layer]["feed_forward"]["router"]
        variables["params"][layer]["feed_forward"]["router"] = jnp.zeros_like(router)
    chosen = step_program(MOE)(variables, kept, counters, jnp.zeros(2, jnp.int32))[2]
    assert float(chosen.experts) == 2 and chosen.distinct_rows() == 0


@pytest.mark.parametrize("name", ["moe-151m-2in32", "pkm-151m-x10", "ultramem-151m-x12"])
@pytest.mark.parametrize("ratio", [2, 8, 32])
def test_sparse_parameters_are_as_many_times_the_dense_ones_as_asked_for(name, ratio):
    assert sparse_over_dense(with_sparsity(preset(name), ratio)) == pytest.approx(ratio, rel=0.03)


def _of_one_layer(model):
    memories = {name: memory.changed(placement="1:1") for name, memory in model.memories.items()}
    return replace(model, num_layers=1, memories=memories)


def test_a_run_writes_tables_figures_and_what_they_are_made_of(run, quick, tmp_path, monkeypatch):
    # `run` imports the program anew, and so its `preset`.
    monkeypatch.setattr(presets, "preset", lambda name: _of_one_layer(preset(name)))
    flags = ["--batches=2", "--rounds=2", "--steps=1", "--dtypes=float32", "--ratios=2", "--ratio_batch=2"]
    models = "--models=moe-tiny,ultramem-tiny"
    status, _, err = run(
        "bench_decode", models, *flags, "--ratio_dtypes=float32", "--cache_length=4", f"--results={tmp_path}"
    )
    assert status == 0, err
    study = DecodeStudy.load(tmp_path / "bench_decode.json")
    assert [(t.study, t.system, t.batch, len(t.seconds)) for t in study.timings] == [
        ("batch", "moe", 2, 2),
        ("batch", "ultramem", 2, 2),
        ("sparsity", "moe", 2, 2),
        ("sparsity", "ultramem", 2, 2),
    ]
    assert study.timings[3].sparse_over_dense == pytest.approx(2, rel=0.03)
    assert 2 <= study.timings[0].cost.experts <= 4 and study.timings[1].cost.rows > 16
    assert [set(t.parts) for t in study.timings] == [
        {"attention", "feed_forward", "logits"},
        {"attention", "feed_forward", "logits", "memory"},
        {"feed_forward"},
        {"memory"},
    ]
    assert {path.suffix for path in tmp_path.iterdir()} == {".md", ".csv", ".json", ".png"}
    text = (tmp_path / "bench_decode.md").read_text()
    (tmp_path / "bench_decode.md").unlink()
    status, out, _ = run("bench_decode", "--redraw", f"--results={tmp_path}")
    assert status == 0 and "bench_decode.md" in out
    assert (tmp_path / "bench_decode.md").read_text() == text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--models=tiny"], "unknown system of preset 'tiny'"),
        (["--models=dense-tin"], "unknown preset 'dense-tin': did you mean 'dense-tiny'?"),
        (["--batches=1,x"], "batches = 'x': must be whole numbers above 0"),
        (["--dtypes=float16"], "unknown dtypes 'float16'"),
        (["--cache_dtype=int8"], "unknown cache_dtype 'int8'"),
        (["--redraw"], "must hold a .json file of an earlier run"),
    ],
)
def test_bad_flags_get_one_line(run, quick, tmp_path, flags, message):
    status, _, err = run("bench_decode", *flags, f"--results={tmp_path / 'none'}")
    assert status == 2
    assert message in err and err.count("\n") == 1
