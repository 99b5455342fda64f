from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.drawn import drawn_state
from tests.support.step_models import FAMILY, MODEL, ULTRAMEM, token_batches
from tests.support.users_compiler import memory_analysis
from ultramem_jax.config import MoEConfig, RunConfig, TrainConfig
from ultramem_jax.config.model import table_readers
from ultramem_jax.models import Transformer
from ultramem_jax.parallel.mesh import one_device
from ultramem_jax.presets import families
from ultramem_jax.training.dense_optimizer import make_optimizers
from ultramem_jax.training.module_step import ModuleStep, Objective
from ultramem_jax.training.state import abstract_state, fresh_state, init_state
from ultramem_jax.training.step import make_eval_step, make_train_step, token_losses

TRAIN = TrainConfig(steps=6, batch_size=8, learning_rate=1e-2, warmup_fraction=0.0)


def _run(config, batches):
    optimizers = make_optimizers(config)
    step = jax.jit(make_train_step(config, optimizers), donate_argnums=0)
    state = drawn_state(config)
    history = []
    for tokens in batches:
        state, metrics = step(state, tokens)
        history.append({name: float(value) for name, value in metrics.items()})
    return state, history


@pytest.mark.parametrize(
    ("name", "micro_batches"),
    [
        ("ultramem", 1),
        ("ultramem-v2", 2),
        ("memory-plus", 1),
        ("peer", 1),
    ],
)
def test_row_sparse_equals_dense_where_every_row_is_read(name, micro_batches):
    model = ULTRAMEM if name == "ultramem" else replace(MODEL, memories={"memory": FAMILY[name]})
    train = replace(TRAIN, grad_accumulation=micro_batches)
    batches = token_batches(3)
    sparse, rows = _run(RunConfig(model, train=train), batches)
    dense, plain = _run(RunConfig(model, train=replace(train, table_gradient="dense")), batches)
    assert set(sparse.tables) == set(table_readers(model))
    for metrics in rows:  # 2048 reads of 16 slots: the premise of the comparison
        assert {metrics[f"{table}/slots_read_share"] for table in sparse.tables} == {1.0}
    chex.assert_trees_all_close([m["loss"] for m in rows], [m["loss"] for m in plain], rtol=1e-5)
    adam = dense.table_state[0]
    for table, parts in sparse.tables.items():
        assert ("pre_values" in parts) == (name in ("ultramem-v2", "peer"))
        for part, values in parts.items():
            chex.assert_trees_all_close(values, dense.tables[table][part], rtol=1e-4, atol=1e-6)
            moments = sparse.table_state[table][part]
            chex.assert_trees_all_close(moments.first, adam.mu[table][part], rtol=1e-4, atol=1e-8)
            chex.assert_trees_all_close(moments.second, adam.nu[table][part], rtol=1e-4, atol=1e-12)
    chex.assert_trees_all_close(sparse.params, dense.params, rtol=1e-4, atol=2e-6)


def test_gradients_by_inputs_are_refused_with_micro_batches():
    config = RunConfig(MODEL, train=replace(TRAIN, grad_accumulation=2))
    objective = Objective(loss=lambda *_: pytest.fail("called"), num_tokens=len, inputs=lambda batch: batch)
    step = ModuleStep(config, make_optimizers(config), objective)
    with pytest.raises(ValueError, match=r"Objective.inputs: must be empty with train.grad_accumulation = 2"):
        step.accumulate(drawn_state(config), jnp.zeros((8, 4)), jax.random.key(0))


def test_row_wise_adagrad_equals_the_dense_way_whatever_is_read():
    memory = ULTRAMEM.memory.changed(placement="1:1", num_keys=16, top_m=4)
    model = replace(MODEL, num_layers=1, memories={"memory": memory})
    train = replace(TRAIN, row_optimizer="adagrad_row", weight_decay=0.0)
    batches = token_batches(3, length=5)
    sparse, rows = _run(RunConfig(model, train=train), batches)
    dense, _ = _run(RunConfig(model, train=replace(train, table_gradient="dense")), batches)
    assert 0 < rows[-1]["memory_0/slots_read_share"] < 0.9
    ours, theirs = (state.tables["memory_0"]["values"] for state in (sparse, dense))
    before = drawn_state(RunConfig(model, train=train)).tables["memory_0"]["values"]
    assert (np.asarray(ours) != np.asarray(before)).any()
    chex.assert_trees_all_close(ours, theirs, rtol=1e-4, atol=1e-6)
    expected = dense.table_state[0].sum_of_squares["memory_0"]["values"]
    squares = sparse.table_state["memory_0"]["values"].squares
    chex.assert_trees_all_close(squares, expected, rtol=1e-4, atol=1e-12)


def test_rows_that_are_not_read_keep_every_bit():
    model = replace(ULTRAMEM, memories={"memory": ULTRAMEM.memory.changed(num_keys=40, top_m=2)})
    config = RunConfig(model, train=TRAIN)
    batches = token_batches(2)
    start = drawn_state(config)
    after, _ = _run(config, batches)
    for name in start.tables:
        seen = np.asarray(after.usage[name].seen)
        assert 0 < seen.sum() < 0.5 * 1600 and seen.sum() == after.usage[name].num_seen
        before_table, table = start.tables[name]["values"], after.tables[name]["values"]
        chex.assert_trees_all_equal(table[~seen], before_table[~seen])
        assert (np.asarray(table[seen]) != np.asarray(before_table[seen])).any(1).all()
        for moment in after.table_state[name]["values"]:
            assert not np.asarray(moment)[~seen].any()


def test_accumulated_micro_batches_equal_one_batch():
    # Sequences of a micro-batch do not meet, so the mean of their gradients is that of the whole batch. The
    # core's sign buffers do meet, and give the same vectors for the same core.
    batches = token_batches(2)
    whole, one = _run(RunConfig(ULTRAMEM, train=TRAIN), batches)
    parts, four = _run(RunConfig(ULTRAMEM, train=replace(TRAIN, grad_accumulation=4)), batches)
    # A mean of four standard deviations is not that of the whole.
    means = [{name: m[1][name] for name in one[0] if "std" not in name} for m in (four, one)]
    chex.assert_trees_all_close(*means, rtol=2e-4)
    chex.assert_trees_all_close(whole.tables, parts.tables, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(("shared", "micro_batches"), [(False, 1), (False, 2), (True, 1)])
def test_compiled_step_holds_nothing_of_the_tables_size(shared, micro_batches):
    # 1,048,576 slots of 32 values: 134 MB a table, three of them with the moments.
    memory = ULTRAMEM.memory.changed(placement="1:1", num_keys=1024, value_dim=32)
    if shared:  # two memories of 724² slots of 16 values and 16 pre-values
        memory = FAMILY["ultramem-v2"].changed(num_keys=724, value_dim=16, pre_value_dim=16)
    train = replace(TRAIN, batch_size=2, grad_accumulation=micro_batches)
    model = replace(MODEL, num_layers=2 if shared else 1, memories={"memory": memory})
    config = RunConfig(model, train=train)
    optimizers = make_optimizers(config)
    state = jax.eval_shape(lambda: init_state(config, optimizers))
    # Few tokens, so that what does grow with tokens (and with √N: scores) stays far below the table.
    tokens = jax.ShapeDtypeStruct((2, 17), jnp.int32)
    table = 1024 * 1024 * 32 * 4
    for record_before in (False, True):
        step = jax.jit(make_train_step(config, optimizers, record_before), donate_argnums=0)
        analysis = memory_analysis(step.lower(state, tokens))
        assert analysis.argument_size_in_bytes > 3 * table
        assert analysis.alias_size_in_bytes > 3 * table  # table and moments are updated in place
        assert analysis.temp_size_in_bytes < 0.1 * table
    dense = replace(config, train=replace(train, table_gradient="dense"))
    step = jax.jit(make_train_step(dense, make_optimizers(dense)), donate_argnums=0)
    state = jax.eval_shape(lambda: init_state(dense, make_optimizers(dense)))
    # Whole gradients, however the compiler fuses: the quicker way will do.
    assert step.lower(state, tokens).compile().memory_analysis().temp_size_in_bytes > table


SELECTING = dict(slots_per_step=512, background="counts.npz")


@pytest.mark.parametrize(
    ("stored", "share", "record", "selection"),
    [
        ("float32", 0.05, False, {}),
        ("float32", 0.05, True, {}),
        ("float32", 0.05, True, SELECTING),
        ("bfloat16", 0.1, True, {}),
    ],
)
def test_temporaries_at_four_million_slots_are_a_small_share_of_the_table(stored, share, record, selection):
    # The shape of the benchmark: 512 tokens, 4,194,304 slots of 128 values, R = 64 reads a token.
    memory = families.ultramem(
        placement="1:1", num_keys=2048, top_m=32, num_heads=2, key_dim=64, value_dim=128, dtype=stored
    )
    # Temporaries are those of the reads, float32 in either case: twice the share of a table half as large.
    table = 2048**2 * 128 * (4 if stored == "float32" else 2)
    train = replace(TRAIN, batch_size=2, **selection)
    if stored == "bfloat16":
        train = replace(train, row_moment_dtype="bfloat16", row_second_moment="row")
    config = RunConfig(replace(MODEL, num_layers=1, embed_dim=256, memories={"memory": memory}), train=train)
    optimizers = make_optimizers(config)
    state = jax.eval_shape(lambda: init_state(config, optimizers))
    tokens = jax.ShapeDtypeStruct((2, 257), jnp.int32)
    step = jax.jit(make_train_step(config, optimizers, record_before=record), donate_argnums=0)
    analysis = memory_analysis(step.lower(state, tokens))
    assert analysis.temp_size_in_bytes < share * table
    assert analysis.alias_size_in_bytes > table


@pytest.mark.usefixtures("without_kernels")  # kernels do not serve the host's memory
def test_a_host_resident_table_trains_bit_for_bit_like_one_on_the_device():
    # A shared table with pre-values, and everything stored in other dtypes, integers among it.
    memory = FAMILY["ultramem-v2"].changed(dtype="bfloat16")
    train = replace(TRAIN, grad_accumulation=2, row_moment_dtype="bfloat16", row_second_moment="row")
    train = replace(train, row_optimizer="adamw_catch_up")
    axes = one_device()
    sharding = axes.sharding()
    batches, ends = token_batches(3), {}
    for kind in ("device", "pinned_host"):
        config = RunConfig(replace(MODEL, memories={"memory": memory.changed(memory_kind=kind)}), train=train)
        optimizers = make_optimizers(config)
        shardings = jax.tree.map(lambda a: a.sharding, abstract_state(config, optimizers, axes))
        step = jax.jit(
            make_train_step(config, optimizers), donate_argnums=0, out_shardings=(shardings, sharding)
        )
        state = fresh_state(config, optimizers, axes, np.uint32(0))
        for tokens in batches:
            before = state
            state, metrics = step(state, jax.device_put(np.asarray(tokens), sharding))
            assert all(a.is_deleted() for a in jax.tree.leaves((before.tables, before.table_state)))
        for array in jax.tree.leaves((state.tables, state.table_state)):
            assert array.sharding.memory_kind == kind
        assert {a.sharding.memory_kind for a in jax.tree.leaves(state.params)} == {"device"}
        ends[kind] = jax.tree.map(np.asarray, (state, metrics))
    chex.assert_trees_all_equal(ends["device"], ends["pinned_host"])


def test_initialising_a_table_takes_little_more_than_the_table():
    memory = ULTRAMEM.memory.changed(placement="1:2", num_keys=1024, value_dim=32)
    config = RunConfig(replace(MODEL, memories={"memory": memory}), train=TRAIN)
    made = memory_analysis(jax.jit(lambda: init_state(config, make_optimizers(config))).lower())
    assert made.temp_size_in_bytes < 0.2 * 1024 * 1024 * 32 * 4


def test_loss_is_the_cross_entropy_of_the_model_and_auxiliary_losses_are_apart():
    moe = replace(MODEL, moe=MoEConfig(num_experts=4, top_k=2, expert_dim=8))
    config, tokens = RunConfig(moe, train=TRAIN), token_batches(1)[0]
    state = drawn_state(config)
    apply = jax.jit(Transformer(moe).apply)
    logits = np.asarray(apply({"params": state.params}, tokens[:, :-1]), np.float64)
    log_probability = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_probability, np.asarray(tokens)[:, 1:, None], -1).mean()
    total = jax.jit(make_eval_step(config))({"params": state.params}, tokens, jnp.ones((8, 16)))
    assert float(total[1]) == 8 * 16 and float(total[0] / total[1]) == pytest.approx(expected, rel=1e-5)
    _, history = _run(config, [tokens])
    assert history[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert history[0]["auxiliary_loss"] > 0  # two layers of balance and router losses


def test_masked_targets_do_not_count():
    config, tokens = RunConfig(MODEL, train=TRAIN), token_batches(1)[0]
    params = {"params": drawn_state(config).params}
    logits = jax.jit(Transformer(MODEL).apply)(params, tokens[:, :-1])
    losses = np.asarray(token_losses(logits, tokens[:, 1:]), np.float64)
    mask = np.random.default_rng(0).integers(0, 2, losses.shape)
    mask[[2, 5]] = 0
    found = jax.jit(make_eval_step(config))(params, tokens, mask.astype(np.float32))
    chex.assert_trees_all_close(found, np.array([(losses * mask).sum(), mask.sum()]), rtol=1e-6)


def test_dropout_is_a_function_of_seed_and_step():
    config = RunConfig(replace(ULTRAMEM, dropout=0.3), train=TRAIN)
    batch = token_batches(1) * 2
    _, once = _run(config, batch)
    _, again = _run(config, batch)
    assert once == again
    _, other = _run(replace(config, train=replace(TRAIN, seed=1)), batch)
    assert once[0]["loss"] != other[0]["loss"]


def test_experts_are_balanced_within_each_micro_batch():
    """Not within the whole batch: the loss is the mean of the micro-batches' own, from the definition."""
    moe = MoEConfig(num_experts=4, top_k=2, expert_dim=8, load_balance_weight=1.0, router_z_weight=0.0)
    model = replace(MODEL, num_layers=1, moe=moe)
    config = RunConfig(model, train=replace(TRAIN, grad_accumulation=4))
    tokens = token_batches(1)[0]
    state = drawn_state(config)
    router = jax.random.normal(jax.random.key(5), state.params["layer_1"]["feed_forward"]["router"].shape)
    state.params["layer_1"]["feed_forward"]["router"] = router

    _, left = jax.jit(
        lambda batch: Transformer(model).apply(
            {"params": state.params},
            batch,
            train=True,
            capture_intermediates=lambda module, _: module.name == "feed_forward_norm",
            mutable=["intermediates"],
        )
    )(tokens[:, :-1])
    (inputs,) = jax.tree.leaves(left["intermediates"])

    def balance(x):
        """X·Σ f_i·p_i of the experts' inputs x, f the shares of choices and p the mean probabilities."""
        logits = np.asarray(x, np.float64).reshape(-1, 16) @ np.asarray(router, np.float64)
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        chosen = np.argsort(-p, axis=1)[:, :2]
        share = np.bincount(chosen.ravel(), minlength=4) / chosen.size
        return 4 * (share * p.mean(0)).sum()

    micro_batches = [balance(inputs[i::4]) for i in range(4)]
    _, metrics = jax.jit(make_train_step(config, make_optimizers(config)))(state, tokens)
    assert float(metrics["auxiliary_loss"]) == pytest.approx(np.mean(micro_batches), rel=1e-5)
    assert abs(balance(inputs) - np.mean(micro_batches)) > 1e-3
